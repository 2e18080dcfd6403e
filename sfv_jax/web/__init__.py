"""The page of `python -m sfv_jax.demo`: videos from images in a browser.

`request` checks what a page asks for, `generation` makes it; both know nothing of HTTP. `server` connects them with
`page/`, which needs nothing from elsewhere. Only `server` needs the packages of the extra `demo`.
"""
