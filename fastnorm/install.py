"""Where the header and the library of this installation are."""

import sys
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
    library = _PACKAGE / "lib" / f"libfastnorm.{'dylib' if sys.platform == 'darwin' else 'so'}"
    if not library.exists():
        raise FileNotFoundError(f"this installation of fastnorm has no C library at {library}")
    return str(library)


def get_cmake_dir():
    """The folder of fastnormConfig.cmake, for find_package's CMAKE_PREFIX_PATH or fastnorm_DIR."""
    return str(Path(get_library()).parent / "cmake" / "fastnorm")


def get_pkgconfig_dir():
    """The folder of fastnorm.pc, for PKG_CONFIG_PATH."""
    return str(Path(get_library()).parent / "pkgconfig")


def flags(*what):
    """What `fastnorm config` prints, one string for each of "cflags", "libs", ..."""
    folder = Path(get_library()).parent
    known = {
        "cflags": f"-I{get_include()}",
        "libs": f"-L{folder} -lfastnorm -Wl,-rpath,{folder}",
        "cmakedir": get_cmake_dir(),
        "pkgconfigdir": get_pkgconfig_dir(),
        "version": version(),
    }
    return [known[name] for name in what]


def version():
    """major.minor.patch, as include/fastnorm.h says it."""
    import re

    text = Path(get_include(), "fastnorm.h").read_text(encoding="utf-8")
    return ".".join(
        re.search(rf"FASTNORM_VERSION_{part} (\d+)", text)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )
