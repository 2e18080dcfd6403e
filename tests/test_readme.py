"""README and docs: commands run or parse as printed; links, paths, module names and the import order are true."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.video import read_clip, write_video
from sfv_jax.data.worlds import World

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
# Flags that make the workflow small; everything else is taken from the README.
SMALL = {
    "prepare": ["--height=64", "--width=64"],
    "train": [
        "--config.steps=2",
        "--config.batch_size=1",
        "--config.accumulation_steps=1",
        "--config.sample_every=0",
        "--config.trainable=conv_out",  # compiles in half the time
    ],
    "sample": ["--height=64", "--width=64"],
}

QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compile soon, run slowly
PARSE = """
import sys
from importlib import import_module
from sfv_jax.runtime import commands
commands.run(lambda: 0, import_module(sys.argv.pop(1)).define_flags)
"""


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced code blocks of a page in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_of(block: str) -> list[list[str]]:
    """Command lines of a bash block as lists of words, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def workflow() -> list[list[str]]:
    """The commands of the README's section on one's own videos."""
    return commands_of(blocks(TEXTS["README.md"].split("## Your own videos")[1], "bash")[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory, smallest_pipeline_folder):
    """A working directory with the files that the README's commands name: an SVD-shaped folder and two videos."""
    place = tmp_path_factory.mktemp("readme")
    (place / "stable-video-diffusion-img2vid").symlink_to(smallest_pipeline_folder)
    (place / "configs").symlink_to(ROOT / "configs")
    world = World(size=64, num_frames=16, radii=(8.0, 16.0))
    for n in range(2):
        (place / "clips").mkdir(exist_ok=True)
        write_video(place / "clips" / f"{n}.mp4", world.clip(n)[0], fps=7)
    (place / "many").mkdir()
    for n in range(20):  # as many as a Frechet distance needs
        (place / "many" / f"{n}.mp4").symlink_to(place / "clips" / "0.mp4")
    write_video(place / "in.png", world.clip(2)[0][:1])
    return place


@pytest.mark.slow
def test_the_commands_of_the_readme(place, smallest_pipeline_folder):
    commands = workflow()
    assert [command[2].removeprefix("sfv_jax.") for command in commands] == [
        "convert",
        "prepare",
        "train",
        "sample",
        "convert",
    ]
    for python, *rest in commands:
        assert python == "python"
        small = SMALL.get(rest[1].removeprefix("sfv_jax."), [])
        done = subprocess.run([sys.executable, *rest, *small], cwd=place, env=QUICK, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    length = json.loads((smallest_pipeline_folder / "unet" / "config.json").read_text())["num_frames"]
    frames = read_clip(place / "out.mp4", num_frames=length)
    assert frames.shape == (length, 64, 64, 3)
    record = json.loads((place / "out.json").read_text())
    assert record["steps"] == 1 and record["step"] == 2 and record["seed"] == 0
    lines = [json.loads(line) for line in (place / "runs/sfv/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] and np.isfinite(list(lines[0].values())).all()
    exported = place / "exported"
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "StableVideoDiffusionPipeline"
    theirs, ours = (
        folder / "vae/diffusion_pytorch_model.safetensors" for folder in (smallest_pipeline_folder, exported)
    )
    assert ours.read_bytes() == theirs.read_bytes()  # what was not trained comes out as it went in

    (example,) = blocks(TEXTS["README.md"], "python")
    before = "import numpy\nimage = numpy.zeros((64, 64, 3), numpy.uint8)\n"
    after = f"assert frames.shape == {(1, length, 64, 64, 3)} and frames.dtype == numpy.uint8"
    program = [sys.executable, "-c", f"{before}{example}{after}"]
    done = subprocess.run(program, cwd=place, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_python_example():
    assert blocks(TEXTS["docs/sampling.md"], "python") == blocks(TEXTS["README.md"], "python")


def test_two_commands_need_nothing_but_python():
    """One line sets up and runs the quickstart, one sets up and runs the tests; nothing comes before them."""
    lines = [line for block in blocks(TEXTS["README.md"], "bash") for line in block.splitlines() if "venv" in line]
    quickstart, test = (line.split(" && ") for line in lines)
    assert quickstart[0] == test[0] == "python3 -m venv .venv"
    assert quickstart[1] == ".venv/bin/pip install -q -e ." and test[1] == '.venv/bin/pip install -q -e ".[test]"'
    assert quickstart[2:] == [".venv/bin/python -m sfv_jax.quickstart --workdir runs/quickstart"]
    assert test[2:] == [".venv/bin/python -m pytest"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "sample",
            ["--checkpoint=nowhere", "--image=in.png", "--out=x.mp4"],
            "sample: --checkpoint=nowhere does not exist: give a file or folder; models in the package: world, ",
        ),
        (
            "sample",
            ["--checkpoint=wrold", "--image=in.png", "--out=x.mp4"],
            "sample: --checkpoint=wrold does not exist: did you mean world? ",
        ),
        (
            "sample",
            ["--checkpoint=world", "--image=nowhere/", "--out=x"],
            "sample: --image nowhere: there is no such file",
        ),
        ("convert", ["--src=nowhere", "--dst=x"], "convert: --src=nowhere does not exist"),
        (
            "convert",
            ["--export", "--src=nowhere", "--dst=x.safetensors"],
            "convert: --dst=x.safetensors: this writes a folder, and the name is that of a file; --what comfyui writes",
        ),
        (
            "train",
            ["--config=configs/sfv.py", "--workdir=x", "--config.batchsize=1"],
            "train: no such config field: 'batchsize'; did you mean batch_size?",
        ),
        ("train", ["--config=configs/sfv.py", "--workdir=x"], "train: config.init is empty"),
        ("prepare", ["--videos=clips", "--svd=nowhere", "--out=x"], "prepare: --svd=nowhere does not exist"),
        (
            "evaluate",
            ["--videos=many", "--reference=many", "--out=x", "--features=absent:f"],
            "evaluate: --features=absent:f: give module:function",
        ),
        ("train", ["--config=configs/sfv.py:tiny", "--workdir=x", "--config.seed=-1"], "train: config.seed=-1: give"),
        ("plan", ["--config=configs/sfv.py:tiny", "--target=cpu:1", "--config.seed=-1"], "plan: config.seed=-1: give"),
        ("quickstart", ["--workdir=x", "--sfv.seed=4294967296"], "quickstart: config.seed=4294967296: give"),
        ("reproduce", ["--workdir=x", "--dry_run", "--set", "seed=-1"], "reproduce: config.seed=-1: give"),
    ],
)
def test_bad_input_is_one_line(place, module, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", f"sfv_jax.{module}", *arguments], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert not list(place.glob("x*"))


def documented_commands() -> list[str]:
    """Every `python -m sfv_jax.COMMAND` with flags, in bash blocks and in inline code of all pages, once each."""
    found = {}
    for text in TEXTS.values():
        lines = [shlex.join(words) for block in blocks(text, "bash") for words in commands_of(block)]
        lines += [" ".join(code.split()) for code in re.findall(r"`(python -m sfv_jax\.[^`]+)`", text)]
        for line in lines:
            if re.match(r"python -m sfv_jax\.\w+ -", line) and "..." not in line:
                found[line] = None
    return list(found)


@pytest.mark.parametrize("line", documented_commands(), ids=lambda line: line.split()[2].removeprefix("sfv_jax."))
def test_documented_flags_exist(line):
    _, _, module, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_of_docs_are_of_known_kinds():
    """A line of a bash block runs python, pip, ruff or a launch script, so that the tests here see it."""
    for name, text in TEXTS.items():
        for block in blocks(text, "bash"):
            for words in commands_of(block):
                known = words[0] in ("python", "python3", "pip", "source") or (ROOT / words[0]).is_file()
                assert known, f"{name}: {' '.join(words)}"


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "launch").glob("*.sh") if path.name != "python.sh")
)
def test_launch_scripts_print_their_usage(script):
    done = subprocess.run([ROOT / "launch" / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and not done.stdout.startswith("#")


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["launch/gpu.sh", "--dry-run"], {"XLA_FLAGS": "--xla_a=1"}),
        (["launch/slurm.sh", "--dry-run"], {}),
        (["launch/tpu.sh", "--dry-run"], {}),
        (["launch/tpu.sh", "--dry-run"], {"TPU": "pod", "ZONE": "zone"}),
        (["launch/local.sh", "--dry-run", "-n", "2", "--"], {}),
    ],
)
def test_dry_runs_print_commands_that_a_shell_reads(words, environment):
    """Arguments with spaces and patterns survive, and the interpreter is the one that PYTHON names."""
    given = ["--config", "configs/sfv.py", "--workdir", "runs/a b", "--config.trainable=up|conv"]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    done = subprocess.run([*words, *given], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        read = shlex.split(line)
        if read[0] == "gcloud":  # a command for another machine, in one word
            read = shlex.split(read[-1])
        else:
            assert sys.executable in read or read[0] == "srun"
        start = read.index("--config")
        assert read[start : start + len(given)] == given


@pytest.mark.parametrize("script", ["gpu.sh", "tpu.sh", "local.sh"])
@pytest.mark.parametrize("kind", ["VIRTUAL_ENV", "CONDA_PREFIX", ".venv", None])
def test_scripts_take_the_environment_and_no_python_outside(script, kind, tmp_path):
    """The clone's own environment comes first, then the active one; without any, one line says what to do."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone/launch")
    interpreter = tmp_path / ("clone/.venv" if kind == ".venv" else "active") / "bin/python"
    given = ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in given} | {"PORT": "1234"}
    if kind:
        interpreter.parent.mkdir(parents=True)
        interpreter.symlink_to(sys.executable)
        environment |= {} if kind == ".venv" else {kind: str(tmp_path / "active")}
    words = [
        tmp_path / "clone/launch" / script,
        "--dry-run",
        *(["--"] if script == "local.sh" else []),
        "--config",
        "c",
    ]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    if kind:
        assert done.returncode == 0 and str(interpreter) in shlex.split(done.stdout), done.stderr
    else:
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"{script}: no environment: make .venv") and done.stderr.count("\n") == 1


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name):
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", TEXTS[name]):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{name} links to {target}#{anchor}"


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    """Paths of this repository in prose and commands; NAME stands for a name to choose."""
    for path in re.findall(r"(?<![\w/.~-])(?:sfv_jax|tests|configs|launch|docs)/[\w./*-]*", TEXTS[name]):
        path = path.rstrip(".")
        assert "NAME" in path or any(ROOT.glob(path.rstrip("/"))), f"{name} names {path}"
    for path in re.findall(r"`([\w/]+\.(?:py|sh))`", TEXTS[name]):
        known = (ROOT, *(ROOT / "sfv_jax").glob("*/"))
        assert "NAME" in path or any((folder / path).is_file() for folder in known), f"{name} names {path}"


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines or exports."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:n])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                pattern = r"^(?:def|class) {0}\b|^{0}\b.* = |^\s*(?:from .*)?import .*\b{0}\b"
                rest = parts[n : n + 1]
                return not rest or bool(re.search(pattern.format(rest[0]), file.read_text(), re.MULTILINE))
    return False


@pytest.mark.parametrize("name", TEXTS)
def test_named_modules_exist(name):
    text = TEXTS[name]
    if name == "CHANGELOG.md":  # the first column of its table lists names of the past
        text = re.sub(r"^\| `[^`]+` \|", "|", text, flags=re.MULTILINE)
    for dotted in re.findall(r"(?<![\w/.])(?:sfv_jax|tests)(?:\.\w+)+", text):
        assert exists(dotted), f"{name} names {dotted}"


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\(([\w]+\.md)\)", TEXTS["docs/README.md"]))
    assert linked == {page.name for page in DOCS} - {"README.md"}


def imported(node: ast.AST) -> set[str]:
    """Packages and top-level modules of sfv_jax that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "sfv_jax":
        names = [f"sfv_jax.{alias.name}" for alias in node.names]
    else:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    parts = {name.split(".")[1] for name in names if name.startswith("sfv_jax.")}
    return parts - {"__version__"}


def test_packages_import_in_one_direction():
    """Every import goes to a line below, in the list of docs/structure.md; every package is in that list."""
    section = TEXTS["docs/structure.md"].split("## Imports")[1]
    floors = re.search(r"```\n(.*?)```", section, re.DOTALL)[1].splitlines()
    rank = {part: n for n, floor in enumerate(floors) for part in floor.split()}
    package = ROOT / "sfv_jax"
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= rank.keys()
    for file in package.rglob("*.py"):
        inside = file.relative_to(package).parts
        part = inside[0].removesuffix(".py") if len(inside) == 1 else inside[0]
        here = rank.get(part, rank["commands"])
        for node in ast.walk(ast.parse(file.read_text())):
            for target in imported(node) - {part}:
                assert rank.get(target, -1) > here, f"{file.relative_to(ROOT)} imports {target}"
