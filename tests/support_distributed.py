"""How the distributed scripts of test_distributed.py end."""

import os
import sys

import torch.distributed as dist


def end_process():
    """Ends a process whose work is done, past the interpreter's own end.

    torch's gloo threads outlive `destroy_process_group`. One that still holds a tensor while the interpreter ends aborts the
    process, now and then ("terminate called without an active exception"; pytorch/pytorch, pull request 179291 and issue 190489).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
