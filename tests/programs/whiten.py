"""Whitening over two ranks equals whitening of the concatenation."""

import torch
import torch.distributed as dist

from ppo.math import masked_whiten

x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)) * 2 + 3
mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.6
whole = masked_whiten(x, mask)
dist.init_process_group("gloo")
rows = slice(0, 1) if dist.get_rank() == 0 else slice(1, 4)
torch.testing.assert_close(masked_whiten(x[rows], mask[rows]), whole[rows], atol=1e-6, rtol=1e-5)
print("equal", flush=True)
dist.destroy_process_group()
