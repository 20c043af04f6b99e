"""The CUDA kernels of the .cu files here: compiled at run time, loaded, and launched on PyTorch's stream.

By NVRTC, which PyTorch brings along: no compiler, toolkit or Triton is needed (Triton has no tensor cores on a T4).
"""

import ctypes
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

SOURCES = ("kernels.cu", "tensor_cores.cu")
MACROS = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}
COUNTERS = 4096  # one for each picture of a norm, or each head whose attention several blocks share
# Compute capability from which `tensor_cores.cu` has what it is made of.
TENSOR_CORES_SINCE = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}


def _check(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"{what} failed with code {code}")


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Return NVRTC and the CUDA driver."""
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    packaged = [str(path) for path in Path(torch.__file__).parents[1].glob(f"nvidia/**/{name}")]
    for candidate in (name, *packaged):
        try:
            return ctypes.CDLL(candidate), ctypes.CDLL("libcuda.so.1")
        except OSError:
            continue
    raise OSError(f"{name} is not to be found")


def compile_kernels(dtype: torch.dtype, capability: tuple[int, int], nvrtc: ctypes.CDLL) -> bytes:
    """Return the sources as machine code for tensors of a dtype on cards of a compute capability."""
    texts = [(name, resources.files("rasengan").joinpath(name).read_text()) for name in SOURCES]
    source = "".join(f'#line 1 "{name}"\n{text}' for name, text in texts).encode()
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", f"-D{MACROS[dtype]}", "--std=c++17"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels", 0, None, None), "nvrtcCreateProgram")
    words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    if nvrtc.nvrtcCompileProgram(program, len(options), words) != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the kernels do not compile: {log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


@cache
def _compiler() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="nvrtc")


@cache
def _compiling(dtype: torch.dtype, capability: tuple[int, int]) -> Future[bytes]:
    """Return what will be the machine code; a thread compiles it."""
    return _compiler().submit(lambda: compile_kernels(dtype, capability, _libraries()[0]))


def begin_to_compile(dtype: torch.dtype, device: torch.device) -> None:
    """Compile while something else is done, such as reading weights: it takes a second or more."""
    if device.type == "cuda" and dtype in MACROS:
        _compiling(dtype, torch.cuda.get_device_capability(device))


class Kernels:
    """The kernels for one dtype, loaded on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.driver = _libraries()[1]
        capability = torch.cuda.get_device_capability(device)
        code = _compiling(dtype, capability).result()
        self.has_tensor_cores = dtype in TENSOR_CORES_SINCE and capability >= TENSOR_CORES_SINCE[dtype]
        self.context = ctypes.c_void_p()
        _check(
            self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), device.index), "cuDevicePrimaryCtxRetain"
        )
        self.bound = threading.local()
        self.bind()
        self.module, self.functions, self.at_once = ctypes.c_void_p(), {}, {}
        _check(self.driver.cuModuleLoadData(ctypes.byref(self.module), code), "cuModuleLoadData")
        # Blocks that are done with a picture, or a head of one, are counted here; each launch leaves it at zero.
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def bind(self) -> None:
        """Make the device's context this thread's; autograd's own threads may not have one yet."""
        if not getattr(self.bound, "done", False):
            _check(self.driver.cuCtxSetCurrent(self.context), "cuCtxSetCurrent")
            self.bound.done = True

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self.functions:
            function = ctypes.c_void_p()
            _check(self.driver.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()), name)
            self.functions[name] = function
        return self.functions[name]

    def blocks_at_once(self, name: str, threads: int) -> int:
        """Return how many blocks of a kernel a multiprocessor has room for, with its registers and shared memory."""
        if name not in self.at_once:
            self.bind()
            count, function, no_bytes = ctypes.c_int(), self._function(name), ctypes.c_size_t(0)
            code = self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(count), function, threads, no_bytes
            )
            _check(code, name)
            self.at_once[name] = count.value
        return self.at_once[name]

    def launch(self, name: str, grid: tuple[int, int], block: tuple[int, int], *arguments, shared_bytes: int = 0):
        """Start a kernel on the current stream; None is a null pointer."""
        self.bind()
        values = [as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.counters.device).cuda_stream)
        code = self.driver.cuLaunchKernel(
            self._function(name), *grid, 1, *block, 1, shared_bytes, stream, pointers, None
        )
        _check(code, name)


def as_c(argument):
    """Return an argument of a launch as C has it: a tensor's address, null for None, a float or an int.

    Raises:
        OverflowError: a number that an int does not hold, which ctypes would cut.
    """
    if argument is None or torch.is_tensor(argument):
        return ctypes.c_void_p(0 if argument is None else argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if not -(2**31) <= argument < 2**31:
        raise OverflowError(f"{argument} is no 32-bit integer")
    return ctypes.c_int(argument)


@cache
def load(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Return the kernels for a dtype on a device with an index; None, and a warning, where NVRTC cannot be used."""
    try:
        return Kernels(dtype, device)
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("The UNet runs by PyTorch's operators, slower: NVRTC cannot be used (%s)", error)
        return None


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def kernels_for(x: torch.Tensor, width: int, widest: int) -> Kernels | None:
    """Return the kernels for a tensor whose channels they can take, or None."""
    fits = x.device.type == "cuda" and x.dtype in MACROS and width % 8 == 0 and width <= widest
    is_countable = x.numel() // 8 < 2**31  # packs, by the int of a launch
    return load(x.dtype, x.device) if fits and is_countable else None


def prepare(dtype: torch.dtype, device: torch.device) -> bool:
    """Load the kernels now rather than in the first step, and say whether the kernels can be used."""
    if device.type != "cuda" or dtype not in MACROS:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return load(dtype, torch.device("cuda", index)) is not None
