"""Our losses beside those of TRL's experimental trainers, where tokenizers agree: the same values and gradients."""

from collections import defaultdict
from functools import partial

import pytest
import torch

from fusion_plugins.core.fusion.chunk_losses import Chunks, advantage
from fusion_plugins.core.fusion.divergences import jensen_shannon
from fusion_plugins.core.fusion.losses import fusion_loss
from fusion_plugins.core.fusion.one_pass import weighted_losses

pytestmark = pytest.mark.slow


def gradient(loss, logits):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def test_one_token_chunks_are_trls_loss_of_sampled_tokens():
    """Its importance-weighted form, with weights of 1 (gamma 0) and without log-probabilities of the rollout."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    generator = torch.Generator().manual_seed(13)
    logits = torch.randn(2, 9, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 17, (2, 9), generator=generator)
    labels[0, :3], labels[1, 5] = -100, -100
    teacher = -3 * torch.rand(2, 9, generator=generator, dtype=torch.float64)
    own = object.__new__(IWOPDTrainer)
    own.temperature, own.iw_opd_gamma, own.iw_opd_epsilon = 1.0, 0.0, 1e-8
    own.model, own._metrics = torch.nn.Identity(), defaultdict(lambda: defaultdict(list))
    place = torch.nn.functional.pad((labels[:, 1:] != -100).long(), (0, 1))
    chunks = Chunks(place, teacher, torch.full_like(teacher, torch.nan), 1)

    def theirs(z):
        following = labels[:, 1:]
        return own._compute_iw_opd_loss(
            z[:, :-1], following.clamp_min(0), following, teacher[:, :-1], num_items_in_batch=1
        )

    def gradient_of_ours(z):
        kind = partial(advantage, clip=1e9)
        return weighted_losses(z, None, None, labels, chunks, lm_weight=0.0, kind=kind, chunk_size=4).total

    torch.testing.assert_close(
        gradient(gradient_of_ours, logits)[1], gradient(theirs, logits)[1], rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_the_jensen_shannon_divergence_is_trls_with_all_entries(beta):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(1, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    ids, ones = torch.arange(9).expand(1, 5, 9), torch.ones(1, 5, dtype=torch.bool)

    def ours(z):
        said, kind = teacher.log_softmax(-1), partial(jensen_shannon, beta=beta)
        return fusion_loss(z, ids, said, torch.ones_like(ids, dtype=torch.bool), ones, kind=kind, reduction="sum")

    def theirs(z):
        return GKDTrainer.generalized_jsd_loss(z, teacher, beta=beta, num_items_in_batch=1)

    for one, other in zip(gradient(ours, student), gradient(theirs, student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
