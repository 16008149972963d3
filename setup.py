"""Build libfastnorm, then the Python binding that is its first client.

The Cython kernels become C once, of which only the kernels are kept: that C knows no Python. It is
compiled for every element type and every x86-64 level (elsewhere: once per type), and linked with
the few hand-written C files.

Environment: CC; FASTNORM_CFLAGS, flags behind setup.py's own; FASTNORM_OPENMP=0, threads from
pthreads alone; FASTNORM_LEVELS=0, one level also on x86-64, that of FASTNORM_CFLAGS (-march=native,
a third of the time to compile); FASTNORM_NATIVE=require, no package without the library.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent.resolve()
KERNELS = Path("fastnorm/kernels")
HEADER = Path("include/fastnorm.h")
DTYPES = ("float32", "float64", "float16", "bfloat16")
LEVELS = {
    True: {  # for x86-64
        "v2": ["-march=x86-64-v2"],
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    False: {"baseline": []},
}
# -O2 leaves loops over a few vectors rolled: 1.2 (layer norm) to 1.8 (SiLU) times the time, for a
# quarter less to compile. (-fno-ipa-cp-clone, which clang refuses, would make the library a seventh
# smaller, for 1.00 of the time.)
COMMON = ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden"]
# Never fused multiply-adds, never -ffast-math: every level must give the same bits.
MATH = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NUMPY_API = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
HAND_WRITTEN = ("fastnorm.c", "simple.c", "parameters.c", "cpu.c", "parallel.c")
MODULES = (
    "rows_forward", "rows_statistics", "rows_backward", "elements_backward", "slabs", "columns",
    "columns_statistics", "across_forward", "across_backward", "down", "edges", "fused", "masks",
)
# Checks that raise would bring Python into the library.
NO_PYTHON = {"language_level": 3, "cdivision": True, "boundscheck": False, "wraparound": False}
PRELUDE = """/* {name}.pyx of fastnorm {version}, as Cython made it C, without its Python module. */
#define CYTHON_INLINE inline __attribute__((always_inline))
#define CYTHON_UNUSED __attribute__((unused))
#define __PYX_EXTERN_C extern
"""


def version():
    text = HEADER.read_text()
    return ".".join(
        re.search(rf"FASTNORM_VERSION_{part} (\d+)", text)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )


def only_kernels(name, text):
    """Of the C that Cython wrote: its includes, types and functions, none of which knows Python."""
    sections = dict(re.findall(
        r"/\* #### Code section: (\w+) ### \*/\n(.*?)(?=/\* #### Code section)", text, re.DOTALL
    ))
    declared = sections["module_declarations"]
    parts = [
        PRELUDE.format(name=name, version=version()),
        text[text.index("/* Early includes */") : text.index("#ifdef _OPENMP\n#include")],
        sections["type_declarations"],
        declared[declared.index("/* Module declarations from") :],
        sections["module_code"],
    ]
    return "\n".join(parts)


def call(command):
    subprocess.run([str(word) for word in command], check=True)


def steps(x86_64):
    """(source, object, flags) of all that is compiled."""
    for module in MODULES:
        for dtype in DTYPES:
            for level, march in LEVELS[x86_64].items():
                defined = [f"-DFN_DTYPE={dtype}", f"-DFN_TYPE_{dtype}", f"-DFN_LEVEL={level}"]
                flags = [*COMMON, *MATH, *march, *defined]
                yield f"{module}.c", f"{module}_{dtype}_{level}.o", flags
    levels = ["-DFASTNORM_X86_LEVELS"] if x86_64 else []
    for source in HAND_WRITTEN:
        yield source, f"{source}.o", [*COMMON, "-Wall", "-Wextra", *MATH, *levels]


def public_names():
    return re.findall(r"fastnorm_\w+", (KERNELS / "libfastnorm.map").read_text())


def sonames(macos=False):
    """(the library's file, its soname, the name that programs are linked by). Until 1.0 a minor
    version may break what an older program relies on."""
    major, minor, _ = version().split(".")
    kept = major if major != "0" else f"0.{minor}"
    name = "libfastnorm.{}.dylib" if macos else "libfastnorm.so.{}"
    return name.format(version()), name.format(kept), name.replace(".{}", "")


class Library:
    """libfastnorm: its objects, and what they are linked to."""

    def __init__(self, temporary):
        self.temporary = Path(temporary) / "libfastnorm"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.compiler = shlex.split(
            os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        )
        target = self._answer("-dumpmachine")
        self.macos = "darwin" in target or "macos" in target
        self.x86_64 = os.environ.get("FASTNORM_LEVELS") != "0" and target.startswith("x86_64")
        self.openmp = ["-fopenmp"] if self._has_openmp() else []
        runtime = " -lomp" if "clang" in self._answer("--version") else " -lgomp"
        self.private = "-lm -lpthread" + (runtime if self.openmp else "")
        self.objects = []

    def write_kernels(self, folder):
        """The kernels' C files into a folder."""
        modules = cythonize(
            [
                Extension(f"fastnorm.kernels.{name}", [str(KERNELS / f"{name}.pyx")])
                for name in MODULES
            ],
            build_dir=str(self.temporary),
            compiler_directives=NO_PYTHON,
        )
        for module, name in zip(modules, MODULES, strict=True):
            text = only_kernels(name, Path(module.sources[0]).read_text())
            (folder / f"{name}.c").write_text(text)

    def compile(self):
        """The kernels for every type and level, and the hand-written C files."""
        self.write_kernels(self.temporary)
        folders = [f"-I{ROOT / 'include'}", f"-I{ROOT / KERNELS}"]
        extra = shlex.split(os.environ.get("FASTNORM_CFLAGS", ""))
        commands = []
        for source, name, flags in steps(self.x86_64):
            folder = ROOT / KERNELS if source in HAND_WRITTEN else self.temporary
            openmp = self.openmp if source in HAND_WRITTEN else []
            self.objects.append(self.temporary / name)
            commands.append([
                *self.compiler, *flags, *folders, *openmp, *extra, "-c", folder / source, "-o",
                self.objects[-1],
            ])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(call, commands))

    def link_shared(self, path, soname):
        extra = shlex.split(os.environ.get("FASTNORM_CFLAGS", ""))
        if self.macos:
            link = [f"-Wl,-install_name,@rpath/{soname}"]
        else:
            script = ROOT / KERNELS / "libfastnorm.map"
            link = [f"-Wl,--version-script={script}", f"-Wl,-soname,{soname}"]
            if "-fsanitize" not in " ".join(extra):  # whose own names come with the program
                link.append("-Wl,-z,defs")
        link += ["-lm", "-lpthread"]
        call([
            *self.compiler, "-shared", "-o", path, *self.objects, *self.openmp, *extra, *link
        ])

    def link_static(self, path):
        """One object, of which only the public names are global. (macOS has no objcopy: there all
        objects, whose other names are hidden from shared libraries alone.)"""
        path.unlink(missing_ok=True)
        if self.macos:
            call(["ar", "rcs", path, *self.objects])
            return
        whole = self.temporary / "libfastnorm.o"
        call([*self.compiler, "-r", "-nostdlib", "-o", whole, *self.objects])
        keep = [f"--keep-global-symbol={name}" for name in public_names()]
        call([self._answer("-print-prog-name=objcopy"), "--strip-unneeded", *keep, whole])
        call([self._answer("-print-prog-name=ar"), "rcs", path, whole])

    def describe(self, folder, include, soname, rpath):
        """pkg-config's and CMake's files, in the folder of the library; `include` from there."""
        major = version().partition(".")[0]
        values = {
            "VERSION": version(), "MAJOR": major, "SONAME": soname, "PRIVATE": self.private,
            "LINKED": sonames(self.macos)[2],
            "RPATH": " -Wl,-rpath,${libdir}" if rpath else "",
        }
        for name, place, start in (
            ("fastnorm.pc", "pkgconfig", "${libdir}/"),
            ("fastnormConfig.cmake", "cmake/fastnorm", ""),
            ("fastnormConfigVersion.cmake", "cmake/fastnorm", ""),
        ):
            text = (ROOT / "include" / f"{name}.in").read_text()
            for key, value in (values | {"INCLUDE": start + include}).items():
                text = text.replace(f"@{key}@", value)
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / name).write_text(text)

    def _answer(self, question):
        """What the compiler says of itself: it may be one for another processor."""
        command = [*self.compiler, question]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    def _has_openmp(self):
        if os.environ.get("FASTNORM_OPENMP") == "0":
            return False
        probe = self.temporary / "probe.c"
        probe.write_text("#include <omp.h>\nint main(void) { return omp_in_parallel(); }\n")
        command = [*self.compiler, "-fopenmp", probe, "-o", self.temporary / "probe"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class BuildWithLibrary(build_ext):
    """build_ext that first builds libfastnorm beside the package's modules.

    Where that fails the package is installed without them, and fastnorm.explain() tells why;
    with FASTNORM_NATIVE=require in the environment it is an error."""

    def run(self):
        package = ROOT / "fastnorm" if self.inplace else Path(self.build_lib) / "fastnorm"
        folder = package / "lib"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not self.inplace:
            (package / "include").mkdir(exist_ok=True)
            shutil.copy(HEADER, package / "include")
        try:
            library = Library(self.build_temp)
            library.compile()
            name = sonames(library.macos)[2]
            library.link_shared(folder / name, name)
            include = "../../include" if self.inplace else "../include"
            library.describe(folder, include, name, rpath=True)
            for extension in self.extensions:
                extension.library_dirs.append(str(folder))
            super().run()
        except (BaseError, CCompilerError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTNORM_NATIVE") == "require":
                raise
            for library in folder.glob("libfastnorm.*"):
                library.unlink()
            reason = str(error).splitlines()[0][:300]
            (folder / "not-built.txt").write_text(reason + "\n")
            print(f"fastnorm: installed without its native library, which was not built: {reason}")
            self.extensions = []


class InstallC(Command):
    """The C library alone, under a prefix: setup.py install_c --prefix=/usr/local."""

    description = "install libfastnorm, its header, pkg-config and CMake files"
    user_options = [  # noqa: RUF012, setuptools wants a list
        ("prefix=", None, "where lib/ and include/ are"),
        ("build-temp=", None, "folder for the objects"),
    ]

    def initialize_options(self):
        self.prefix = "/usr/local"
        self.build_temp = "build/c"

    def finalize_options(self):
        self.prefix = Path(self.prefix).expanduser().resolve()

    def run(self):
        folder, include = self.prefix / "lib", self.prefix / "include"
        for place in (folder, include):
            place.mkdir(parents=True, exist_ok=True)
        library = Library(self.build_temp)
        library.compile()
        full, soname, linked = sonames(library.macos)
        library.link_shared(folder / full, soname)
        for link, target in ((soname, full), (linked, soname)):
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(target)
        library.link_static(folder / "libfastnorm.a")
        library.describe(folder, "../include", soname, rpath=False)
        shutil.copy(HEADER, include)


class DistC(Command):
    """The C library's sources for a machine without Python: dist/fastnorm-c-VERSION.tar.gz."""

    description = "archive libfastnorm's C sources, to be built with make alone"
    user_options = [("dist-dir=", None, "folder for the archive")]  # noqa: RUF012

    def initialize_options(self):
        self.dist_dir = "dist"

    def finalize_options(self):
        self.dist_dir = Path(self.dist_dir)

    def run(self):
        name = f"fastnorm-c-{version()}"
        folder = Path("build") / name
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("src", "include", "tests", "objects"):
            (folder / part).mkdir(parents=True)
        library = Library("build/dist-c")
        library.write_kernels(folder / "src")
        for pattern in ("*.h", "*.map", *HAND_WRITTEN):
            for file in KERNELS.glob(pattern):
                shutil.copy(file, folder / "src")
        for file in ("tests/test_library.c", "tests/test_attack.c"):
            shutil.copy(file, folder / "tests")
        shutil.copy(HEADER, folder / "include")
        shutil.copy("LICENSE", folder)
        (folder / "objects/.keep").touch()
        full, soname, _ = sonames()
        library.describe(folder, "../include", soname, rpath=False)
        for file in (*folder.glob("pkgconfig/*"), *folder.glob("cmake/fastnorm/*")):
            file.rename(folder / file.name)
        shutil.rmtree(folder / "pkgconfig")
        shutil.rmtree(folder / "cmake")
        text = Path("include/Makefile.in").read_text()
        for key, value in {
            "FULL": full, "SONAME": soname, "X86_64": self.rules(True), "OTHER": self.rules(False),
            "KEEP": " ".join(f"--keep-global-symbol={public}" for public in public_names()),
        }.items():
            text = text.replace(f"@{key}@", value)
        (folder / "Makefile").write_text(text)
        self.dist_dir.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.dist_dir / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder, name)

    def rules(self, x86_64):
        objects, rules = [], []
        for source, name, flags in steps(x86_64):
            objects.append(f"objects/{name}")
            openmp = " $(OPENMP)" if source in HAND_WRITTEN else ""
            rules.append(
                f"objects/{name}: src/{source}\n\t$(CC) {' '.join(flags)} -Iinclude -Isrc{openmp}"
                " $(CFLAGS) -c $< -o $@"
            )
        return "\n".join([f"OBJECTS = {' '.join(objects)}", *rules])


BESIDE = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"  # the extension's own folder
modules = cythonize(
    [
        Extension(
            "fastnorm.backends.native",
            ["fastnorm/backends/native.pyx"],
            include_dirs=["include", numpy.get_include()],
            libraries=["fastnorm"],
            runtime_library_dirs=[f"{BESIDE}/../lib"],
            define_macros=NUMPY_API,
        ),
        Extension(
            "fastnorm.whole",
            ["fastnorm/whole.pyx"],
            include_dirs=["include", numpy.get_include()],
            define_macros=NUMPY_API,
        ),
        Extension(
            "fastnorm.bench._floor",
            ["fastnorm/bench/_floor.pyx", "fastnorm/bench/floor.c"],
            include_dirs=["fastnorm/bench", numpy.get_include()],
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            define_macros=NUMPY_API,
        ),
    ],
    build_dir="build/cython",
    language_level=3,
)
modules[-1].optional = True  # where there is no OpenMP; cythonize drops the argument of that name
setup(
    version=version(),
    cmdclass={"build_ext": BuildWithLibrary, "install_c": InstallC, "dist_c": DistC},
    ext_modules=modules,
)
