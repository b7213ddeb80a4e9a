"""Where Triton kernels run in tests: on the CUDA device where there is one, else in Triton's interpreter on the CPU.

`conftest.py` has chosen the interpreter before anything imported triton.
"""

import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# In the interpreter a bfloat16 product is silently wrong; float32 stands in.
COMPUTE_DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16)
