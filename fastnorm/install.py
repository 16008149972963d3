"""Where the header and the library of this installation are."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def get_include():
    """The folder that holds fastnorm.h, for a C compiler's -I."""
    installed = _PACKAGE / "include"
    # An editable install uses the source tree, where the header is at the top level.
    return str(installed if installed.is_dir() else _PACKAGE.parent / "include")


def get_library():
    """The path of the shared library libfastnorm.

    Raises FileNotFoundError where this installation has none.
    """
    library = _PACKAGE / "lib" / "libfastnorm.so"
    if not library.exists():
        raise FileNotFoundError(f"this installation of fastnorm has no C library at {library}")
    return str(library)


def version():
    """major.minor.patch, as include/fastnorm.h says it."""
    import re

    text = Path(get_include(), "fastnorm.h").read_text(encoding="utf-8")
    return ".".join(
        re.search(rf"FASTNORM_VERSION_{part} (\d+)", text)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )
