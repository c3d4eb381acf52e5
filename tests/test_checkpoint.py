"""What resuming takes over, and what it takes from the settings when it is told so."""

import pytest
import torch
from diffusion_trainer.utils.checkpoint import Trained, load_checkpoint, save_checkpoint
from diffusion_trainer.utils.run_folder import RunFolder


def trained(seed, **numbers):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    names = {parameter: name for name, parameter in module.named_parameters()}
    return Trained(names, module, lambda stepped: [torch.optim.AdamW(stepped.values(), **numbers)])


@pytest.fixture
def checkpoint(tmp_path):
    source = trained(0, lr=0.1, weight_decay=0.5)
    for gradient in source.gradients.views.values():
        gradient.fill_(1.0)
    source.step()
    save_checkpoint(RunFolder(tmp_path), 1, "0", True, True, source, {"epoch": 2}, lambda: None, 2)
    return tmp_path / "global_step1", source


@pytest.mark.parametrize(
    ("options", "has_state", "weight_decay"),
    [({}, True, 0.5), ({"optimizer_groups": False}, True, 0.1),
     ({"optimizer_state": False, "optimizer_groups": False}, False, 0.1)],
)  # fmt: skip
def test_what_is_taken_over(checkpoint, options, has_state, weight_decay):
    folder, source = checkpoint
    target = trained(1, lr=0.2, weight_decay=0.1)
    assert load_checkpoint(folder, target, **options)["epoch"] == 2
    for name, parameter in target.parameters.items():
        assert torch.equal(parameter, source.parameters[name])
        state = target.optimizers[0].state.get(target.stepped[name], {})
        assert bool(state) == has_state
        if has_state:
            assert torch.equal(state["exp_avg"], source.optimizers[0].state[source.stepped[name]]["exp_avg"])
    (group,) = target.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.2, weight_decay)
