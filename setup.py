"""Build libfastnorm, then the Python binding that is its first client.

The Cython kernels become C once. That C is compiled for every element type and every x86-64
level (elsewhere: once per type), linked with the few hand-written C files, and the linker drops
the Python module code that nothing reaches, so that libfastnorm needs no Python.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
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
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = (
    {
        "v2": ["-march=x86-64-v2"],
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
    if X86_64
    else {"baseline": []}
)
COMMON = [
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffunction-sections",
    "-fdata-sections",
]
# Never fused multiply-adds, never -ffast-math: every level must give the same bits.
MATH = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NUMPY_API = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
MODULES = ("rows_forward", "rows_backward", "columns", "across", "fused", "masks")
# Checks that raise would bring Python into the library.
NO_PYTHON = {"language_level": 3, "cdivision": True, "boundscheck": False, "wraparound": False}
INLINE = "-DCYTHON_INLINE=inline __attribute__((always_inline))"


def version():
    text = HEADER.read_text()
    return ".".join(
        re.search(rf"FASTNORM_VERSION_{part} (\d+)", text)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )


def call(command):
    subprocess.run([str(word) for word in command], check=True)


class Library:
    """libfastnorm: its objects, and what they are linked to."""

    def __init__(self, temporary):
        self.temporary = Path(temporary) / "libfastnorm"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.compiler = shlex.split(
            os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        )
        self.openmp = ["-fopenmp"] if self._has_openmp() else []
        self.private = "-lm -lpthread" + (" -lgomp" if self.openmp else "")
        self.objects = []

    def compile(self):
        """The kernels for every type and level, and the hand-written C files."""
        includes = [f"-I{ROOT / 'include'}", f"-I{ROOT / KERNELS}"]
        python = f"-I{sysconfig.get_path('include')}"
        extra = shlex.split(os.environ.get("FASTNORM_CFLAGS", ""))
        commands = []

        def compile_(source, name, *flags):
            self.objects.append(self.temporary / f"{name}.o")
            commands.append([
                *self.compiler, *COMMON, *includes, *flags, *extra, "-c", str(source), "-o",
                self.objects[-1],
            ])

        modules = cythonize(
            [
                Extension(f"fastnorm.kernels.{name}", [str(KERNELS / f"{name}.pyx")])
                for name in MODULES
            ],
            build_dir=str(self.temporary),
            compiler_directives=NO_PYTHON,
        )
        for module in modules:
            name = module.name.rpartition(".")[2]
            for dtype in DTYPES:
                for level, march in LEVELS.items():
                    variant = f"{name}_{dtype}_{level}"
                    compile_(
                        module.sources[0],
                        variant,
                        *MATH,
                        *march,
                        INLINE,
                        python,
                        f"-DFN_DTYPE={dtype}",
                        f"-DFN_TYPE_{dtype}",
                        f"-DFN_LEVEL={level}",
                        f"-DPyInit_{name}=PyInit_{variant}",
                        f"-D__pyx_module_is_main_fastnorm__kernels__{name}=is_main_{variant}",
                    )
        for source in ("fastnorm.c", "simple.c", "cpu.c", "parallel.c"):
            levels = ["-DFASTNORM_X86_LEVELS"] if X86_64 else []
            compile_(KERNELS / source, source, "-Wall", "-Wextra", *MATH, *self.openmp, *levels)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(call, commands))

    def link_shared(self, path, soname):
        script = ROOT / KERNELS / "libfastnorm.map"
        link = ["-Wl,--gc-sections", "-Wl,-z,defs", f"-Wl,--version-script={script}"]
        link += [f"-Wl,-soname,{soname}", "-lm", "-lpthread"]
        extra = shlex.split(os.environ.get("FASTNORM_CFLAGS", ""))
        if "-fsanitize" in " ".join(extra):
            link.remove("-Wl,-z,defs")  # the sanitizers' own names come with the program
        call([
            *self.compiler, "-shared", "-o", path, *self.objects, *self.openmp, *extra, *link
        ])

    def link_static(self, path):
        """One object of what the public names reach, and only they are global in it. The linker
        leaves the names that nothing uses any more, Python's, to objcopy."""
        names = re.findall(r"fastnorm_\w+", (KERNELS / "libfastnorm.map").read_text())
        whole = self.temporary / "libfastnorm.o"
        roots = [f"-Wl,-u,{name}" for name in names]
        call([
            *self.compiler, "-r", "-nostdlib", "-Wl,--gc-sections", *roots, "-o", whole,
            *self.objects,
        ])
        keep = [f"--keep-global-symbol={name}" for name in names]
        call(["objcopy", "--strip-unneeded", *keep, whole])
        path.unlink(missing_ok=True)
        call(["ar", "rcs", path, whole])

    def describe(self, folder, include, soname, rpath):
        """pkg-config's and CMake's files, in the folder of the library; `include` from there."""
        major = version().partition(".")[0]
        values = {
            "VERSION": version(), "MAJOR": major, "SONAME": soname, "PRIVATE": self.private,
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
            library.link_shared(folder / "libfastnorm.so", "libfastnorm.so")
            include = "../../include" if self.inplace else "../include"
            library.describe(folder, include, "libfastnorm.so", rpath=True)
            for extension in self.extensions:
                extension.library_dirs.append(str(folder))
            super().run()
        except (BaseError, CCompilerError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTNORM_NATIVE") == "require":
                raise
            (folder / "libfastnorm.so").unlink(missing_ok=True)
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
        # Until 1.0 a minor version may break what an older program relies on.
        major, minor, _ = version().split(".")
        soname = f"libfastnorm.so.{major}" if major != "0" else f"libfastnorm.so.0.{minor}"
        full = f"libfastnorm.so.{version()}"
        library.link_shared(folder / full, soname)
        for link, target in ((soname, full), ("libfastnorm.so", soname)):
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(target)
        library.link_static(folder / "libfastnorm.a")
        library.describe(folder, "../include", soname, rpath=False)
        shutil.copy(HEADER, include)


setup(
    version=version(),
    cmdclass={"build_ext": BuildWithLibrary, "install_c": InstallC},
    ext_modules=cythonize(
        [
            Extension(
                "fastnorm.backends.native",
                ["fastnorm/backends/native.pyx"],
                include_dirs=["include", numpy.get_include()],
                libraries=["fastnorm"],
                runtime_library_dirs=["$ORIGIN/../lib"],
                define_macros=NUMPY_API,
            ),
            Extension(
                "fastnorm.bench._floor",
                ["fastnorm/bench/_floor.pyx", "fastnorm/bench/floor.c"],
                include_dirs=["fastnorm/bench", numpy.get_include()],
                extra_compile_args=["-O3", "-fopenmp"],
                extra_link_args=["-fopenmp"],
                define_macros=NUMPY_API,
                optional=True,
            ),
        ],
        build_dir="build/cython",
        language_level=3,
    ),
)
