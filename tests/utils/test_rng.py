"""Keyed seeds."""

from __future__ import annotations

import pytest
import torch

from distil_tl.utils.rng import keyed_seed, seed_torch


def test_a_seed_depends_on_every_part_of_its_key_and_on_its_type() -> None:
    keys = [
        (0, "order", "head", 1),
        (1, "order", "head", 1),
        (0, "order", "head", 2),
        (0, "order", "hea", "d", 1),
        (0, "1"),
    ]
    seeds = {keyed_seed(*key) for key in [*keys, (0, 1)]}
    assert len(seeds) == len(keys) + 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert keyed_seed(0, "order", "head", 1) == 4715939018618384918, "the same on every machine and in every version"


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_draws_are_those_after_manual_seed(name: str) -> None:
    device = torch.device(name)
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    seed_torch(device, 3, "step")
    found = torch.rand(4), torch.rand(4, device=device)
    torch.manual_seed(keyed_seed(3, "step"))
    assert all(map(torch.equal, found, (torch.rand(4), torch.rand(4, device=device))))
