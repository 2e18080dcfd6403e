# Read by the other scripts: sets `python` to the interpreter of the environment with this repository's packages.
# It is $PYTHON, else .venv/bin/python of this repository, else that of the active environment.
python=${PYTHON:-}
for folder in "$(dirname "${BASH_SOURCE[0]}")/../.venv" "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
  [ -n "$python" ] || [ -z "$folder" ] || [ ! -x "$folder/bin/python" ] || python=$(cd "$folder/bin" && pwd)/python
done
if [ -z "$python" ]; then
  echo "${0##*/}: no environment: make .venv as the README tells, activate one, or name its interpreter with PYTHON" >&2
  exit 1
fi
