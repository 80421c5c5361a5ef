"""ONNX: a module of torch as a graph that other runtimes read, and a session of onnxruntime that runs it.

torch.export follows a module once, with symbols for the sizes that may change, and gives a graph of
operators (ExportedProgram). torch.onnx translates these, one after the other, to operators of ONNX
(https://onnx.ai), whose file onnxruntime reads without torch. Nothing is pickled: a .onnx file is a
protocol buffer.
"""

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.run import UserError, check


@contextmanager
def quiet():
    """No warnings of exporters and quantisers about what is not used here (torchvision, preprocessing)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(module, args, dynamic=None):
    """torch.export: one pass over `args` with symbolic sizes -> ExportedProgram.

    dynamic: a torch.export.Dim for each size that may change, nested as the arguments are. Raises
    UserError if Python wants the value of such a size, as for a flag: a graph has no branches.
    """
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, dynamic_shapes=dynamic)
    # a size where Python wants a number or a truth: TypeError, a dynamo error, ...
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torch.export cannot follow this module: {reason}") from None


def write(program, path, inputs, outputs):
    """ExportedProgram -> ONNX file, with names for its inputs and outputs, in their order -> path."""
    path = Path(path)
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
        )
        assert made is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(str(path), external_data=False)
    return path


def write_batched(module, args, path, inputs, outputs):
    """A module whose inputs all begin with the batch -> ONNX file for any batch of 1 or more -> path.

    args: an example of each input, of two or more, for torch.export takes a size of 1 for a constant.
    """
    batch = torch.export.Dim("batch", min=1)
    program = export(module, args, tuple({0: batch} for _ in args))
    return write(program, path, inputs, outputs)


def session(path, threads=1):
    """A file -> onnxruntime.InferenceSession on the CPU. Raises UserError for a file that is none."""
    import onnxruntime

    check(Path(path).is_file(), f"no ONNX file at {path}; export one first")
    # as many threads as torch has, else times say nothing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # its exceptions have no base class of their own
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"onnxruntime cannot read {path}: {reason}") from None


def run_session(running, tensors, outputs=None):
    """{name: tensor} -> list of tensors, all outputs or those that are named."""
    fed = {name: x.numpy() for name, x in tensors.items()}
    return [torch.from_numpy(x) for x in running.run(outputs, fed)]


class OnnxModule:
    """A file as a function of tensors -> its first output. inputs: their names, in the order of the file."""

    def __init__(self, path, threads=1):
        self.session = session(path, threads)
        self.inputs = [x.name for x in self.session.get_inputs()]

    def __call__(self, *tensors):
        return run_session(self.session, dict(zip(self.inputs, tensors, strict=True)))[0]
