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
from setuptools import Extension, setup
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
# Checks that raise would bring Python into the library.
NO_PYTHON = {"language_level": 3, "cdivision": True, "boundscheck": False, "wraparound": False}
INLINE = "-DCYTHON_INLINE=inline __attribute__((always_inline))"


def version():
    text = HEADER.read_text()
    return ".".join(
        re.search(rf"FASTNORM_VERSION_{part} (\d+)", text)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )


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
            self.build_library(folder / "libfastnorm.so")
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

    def build_library(self, library):
        """Compile the kernels for every type and level, and link them without Python."""
        temporary = Path(self.build_temp) / "libfastnorm"
        temporary.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        openmp = ["-fopenmp"] if self.has_openmp(compiler, temporary) else []
        includes = [f"-I{ROOT / 'include'}", f"-I{ROOT / KERNELS}"]
        python = f"-I{sysconfig.get_path('include')}"
        commands, objects = [], []

        def compile_(source, name, *flags):
            objects.append(temporary / f"{name}.o")
            commands.append(
                [*compiler, *COMMON, *includes, *flags, "-c", str(source), "-o", objects[-1]]
            )

        for module in cythonize(
            [
                Extension(f"fastnorm.kernels.{name}", [str(KERNELS / f"{name}.pyx")])
                for name in ("rows", "columns", "fused")
            ],
            build_dir=str(temporary),
            compiler_directives=NO_PYTHON,
        ):
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
            compile_(KERNELS / source, source, "-Wall", "-Wextra", *MATH, *openmp, *levels)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.call, commands))
        script = ROOT / KERNELS / "libfastnorm.map"
        link = ["-Wl,--gc-sections", "-Wl,-z,defs", f"-Wl,--version-script={script}"]
        link += ["-Wl,-soname,libfastnorm.so", "-lm", "-lpthread"]
        self.call([*compiler, "-shared", "-o", library, *objects, *openmp, *link])

    def has_openmp(self, compiler, temporary):
        if os.environ.get("FASTNORM_OPENMP") == "0":
            return False
        probe = temporary / "probe.c"
        probe.write_text("#include <omp.h>\nint main(void) { return omp_in_parallel(); }\n")
        command = [*compiler, "-fopenmp", probe, "-o", temporary / "probe"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def call(self, command):
        subprocess.run([str(word) for word in command], check=True)


setup(
    version=version(),
    cmdclass={"build_ext": BuildWithLibrary},
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
