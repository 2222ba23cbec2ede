"""Builds the extension modules of chatcore._fast; pyproject.toml has all other metadata of the package.

``CHATCORE_DEBUG=1`` enables internal checks (CC_CHECK, bounds, asserts) and disables optimisation that
hides lines. ``CHATCORE_SANITIZE=undefined`` (or ``address,undefined``) adds sanitizers; the latter needs
LD_PRELOAD of libasan and libubsan. Use ``build_ext --force`` when changing between these builds.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("CHATCORE_DEBUG", "") not in ("", "0")
SANITIZE = os.environ.get("CHATCORE_SANITIZE", "")

# No -march, so that a wheel runs on any x86-64 or arm64. -g costs nothing at run time, and lets `py-spy --native` and
# gdb name the functions.
CFLAGS = ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"] if DEBUG else ["-O3", "-g"]
MACROS = [("CHATCORE_DEBUG", "1")] if DEBUG else [("CYTHON_WITHOUT_ASSERTIONS", "1")]
LDFLAGS = []
if SANITIZE:
    CFLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

setup(
    # The modules contain the generated C code. The .pyx stay, so that debuggers and profilers can show their lines.
    exclude_package_data={"chatcore._fast": ["*.c"]},
    ext_modules=cythonize(
        [
            Extension(
                f"chatcore._fast.{name}",
                [f"chatcore/_fast/{name}.pyx"],
                define_macros=MACROS,
                extra_compile_args=[*CFLAGS, "-Wno-unused-function"],
                extra_link_args=LDFLAGS,
            )
            for name in ("bucket", "frames", "outbox", "uring", "conns", "topics", "reactor", "runs")
        ],
        compiler_directives={
            "language_level": "3",
            "boundscheck": DEBUG,
            "wraparound": False,
            "initializedcheck": DEBUG,
            "cdivision": True,
            "embedsignature": True,
        },
    ),
)
