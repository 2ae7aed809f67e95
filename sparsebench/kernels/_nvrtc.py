"""CUDA C++ compiled at run time with the compiler that comes with torch (NVRTC), launched through the CUDA driver.

No toolkit is needed on the user's machine. Both libraries are reached through NVIDIA's own `cuda-bindings`, which torch
depends on.
"""

from __future__ import annotations

import ctypes
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


def checked(result: tuple) -> Any:
    """The value of a cuda-bindings call. Raises RuntimeError with the library's name for the error."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code.name}")
    return values[0] if len(values) == 1 else tuple(values)


def compile_cubin(source: str, architecture: str, defines: dict[str, int], options: tuple[str, ...] = ()) -> bytes:
    """Machine code for e.g. architecture `sm_90`. Needs no GPU. Raises RuntimeError with the compiler's messages."""
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    flags = [
        f"--gpu-architecture={architecture}",
        "--use_fast_math",
        *options,
        *(f"-D{k}={v}" for k, v in defines.items()),
    ]
    result = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    if int(result[0]) != 0:
        raise RuntimeError(f"NVRTC: {log.decode(errors='replace')}")
    cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def source_of(file: Path) -> str:
    """A source file with the files of its own folder that it includes in their place."""
    return re.sub(
        r'^#include "(\w+\.cu)"$', lambda line: source_of(file.with_name(line[1])), file.read_text(), flags=re.M
    )


@functools.cache
def module(file: Path, device: int, **defines: int) -> Any:
    """The loaded module of a source file for a device, compiled once per process and set of defines."""
    from cuda.bindings import driver

    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability(device)
    return checked(driver.cuModuleLoadData(compile_cubin(source_of(file), f"sm_{major}{minor}", defines)))


def compile_together(file: Path, device: int, variants: list[dict[str, int]]) -> None:
    """Compile a source file with each set of defines, side by side, so that `module` has them at once."""

    def one(defines: dict[str, int]) -> None:
        torch.zeros(1, device=f"cuda:{device}")  # this thread's context
        module(file, device, **dict(sorted(defines.items())))

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, variants))


@functools.cache
def function(file: Path, name: str, device: int, shared_bytes: int, **defines: int) -> Any:
    """A kernel by name, allowed to use `shared_bytes` of shared memory."""
    from cuda.bindings import driver

    handle = checked(driver.cuModuleGetFunction(module(file, device, **dict(sorted(defines.items()))), name.encode()))
    if shared_bytes > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(handle, attribute, shared_bytes))
    return handle


def launch(kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: list, overlap: bool) -> None:
    """Start a kernel on torch's current stream. arguments: ctypes values, kept alive by the caller until it has run.

    overlap: the kernel may start while the one before it drains (programmatic dependent launch, Hopper and newer); it
    must then wait by itself (griddepcontrol.wait).
    """
    from cuda.bindings import driver

    settings = driver.CUlaunchConfig()
    settings.gridDimX, settings.gridDimY, settings.gridDimZ = *grid, 1
    settings.blockDimX, settings.blockDimY, settings.blockDimZ = threads, 1, 1
    settings.sharedMemBytes = shared_bytes
    settings.hStream = torch.cuda.current_stream().cuda_stream
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        settings.attrs, settings.numAttrs = [attribute], 1
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    checked(driver.cuLaunchKernelEx(settings, kernel, ctypes.addressof(pointers), 0))
