"""Log-probs and values of batches against models that are run on one row at a time, without padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ftpipe.modeling import attended
from ftpipe.ppo.layout import Answer, answer_logits, chosen_logps, lay, padded, state_values
from ftpipe.ppo.roles import body_of
from tests.unit.ppo.tiny import KINDS, PAD, WORDS, answers, model, plain_logits, plain_values

SIZES = ((3, 5), (7, 1), (1, 4), (5, 6), (2, 2))
BATCHES = ([0, 1, 2, 3, 4], [4, 2, 0], [3], [1, 3])


def tensor(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_prompts_end_and_answers_begin_in_one_column() -> None:
    some = [Answer((5, 3), (6, 7, 3), True), Answer((8, 9, 3, 4), (3,), True)]
    batch = lay(some, PAD)
    assert torch.equal(batch.ids_BL, tensor([3, 3, 5, 3, 6, 7, 3], [8, 9, 3, 4, 3, 3, 3]))
    assert torch.equal(batch.attended_BL, tensor([0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]))
    assert torch.equal(batch.answers_BT, tensor([6, 7, 3], [3, 3, 3]))
    assert torch.equal(batch.mask_BT, tensor([1, 1, 1], [1, 0, 0]).bool())
    # what is attended is counted from 0; the rest may have any position that there is
    positions_BL = attended(model(), batch.ids_BL, batch.attended_BL)["position_ids"]
    assert positions_BL[0, 2:].tolist() == [0, 1, 2, 3, 4]
    assert positions_BL[1, :5].tolist() == [0, 1, 2, 3, 4]
    assert int(positions_BL.min()) >= 0 and int(positions_BL.max()) < 7


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_each_answer_alone(kind: str, temperature: float) -> None:
    every, policy = answers(0, *SIZES), model(kind)
    for chosen in BATCHES:
        some = [every[at] for at in chosen]
        batch = lay(some, PAD)
        with torch.no_grad():
            logits_BTV = answer_logits(policy, batch, temperature)
            logps_BT = chosen_logps(logits_BTV, batch)
        assert logits_BTV.shape == (len(some), batch.longest, WORDS)
        assert logits_BTV.dtype == torch.float32
        for b, one in enumerate(some):
            length = len(one.tokens)
            with torch.no_grad():
                plain_TV = plain_logits(policy, one).double() / temperature
            want_TV = plain_TV.log_softmax(-1)
            torch.testing.assert_close(logits_BTV[b, :length].double(), plain_TV, rtol=1e-4, atol=2e-5)
            want = [want_TV[t, token].item() for t, token in enumerate(one.tokens)]
            assert logps_BT[b, :length].tolist() == pytest.approx(want, abs=2e-5)
            assert logps_BT[b, length:].tolist() == [0.0] * (batch.longest - length)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_before_each_token_of_each_answer_alone(kind: str) -> None:
    every, body = answers(1, *SIZES), body_of(model(kind))
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1)
    for chosen in BATCHES:
        some = [every[at] for at in chosen]
        batch = lay(some, PAD)
        with torch.no_grad():
            values_BT = state_values(body, head, batch)
            for b, one in enumerate(some):
                length = len(one.tokens)
                torch.testing.assert_close(
                    values_BT[b, :length], plain_values(body, head, one), rtol=1e-4, atol=2e-5
                )
                assert values_BT[b, length:].tolist() == [0.0] * (batch.longest - length)


def test_whole_models_in_float64_agree_to_its_precision() -> None:
    # nothing but rounding to float32 at the end is left
    every, policy = answers(2, *SIZES), model().double()
    batch = lay(every, PAD)
    with torch.no_grad():
        logits_BTV = answer_logits(policy, batch, 1.0)
        for b, one in enumerate(every):
            want_TV = plain_logits(policy, one)
            torch.testing.assert_close(
                logits_BTV[b, : len(one.tokens)], want_TV.float(), rtol=3e-7, atol=1e-7
            )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_gradient(kind: str) -> None:
    # the same answers in one batch and in batches of one: one gradient
    every, gradients = answers(3, *SIZES), []
    for size in (1, len(SIZES)):
        policy = model(kind)
        for at in range(0, len(every), size):
            batch = lay(every[at : at + size], PAD)
            chosen_logps(answer_logits(policy, batch, 0.8), batch).sum().backward()
        gradients.append([w.grad for w in policy.parameters() if w.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_output_head_sees_the_places_of_the_answers_alone_and_in_one_piece() -> None:
    policy, batch = model(), lay(answers(4, *SIZES), PAD)
    taken: list[Tensor] = []
    policy.get_output_embeddings().register_forward_hook(lambda _, given, __: taken.append(given[0]))
    answer_logits(policy, batch, 1.0)
    (hidden_BTH,) = taken
    assert hidden_BTH.shape[:2] == batch.mask_BT.shape
    assert hidden_BTH.is_contiguous()  # else torch copies the head's weights for each row


def test_a_model_that_cannot_leave_logits_out_gives_the_same() -> None:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = model()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
            positions_BL = (attention_mask.cumsum(1) - 1).clamp(min=0)
            return self.policy(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions_BL,
                use_cache=use_cache,
            )

    batch = lay(answers(5, *SIZES), PAD)
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(Whole(), batch, 0.7), answer_logits(model(), batch, 0.7), rtol=1e-5, atol=1e-6
        )


def test_the_head_of_the_values_computes_in_float32() -> None:
    body, batch = body_of(model()), lay(answers(6, *SIZES), PAD)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values_BT = state_values(body, head, batch)
        given = {
            "input_ids": batch.ids_BL,
            "attention_mask": batch.attended_BL,
            "position_ids": (batch.attended_BL.cumsum(1) - 1).clamp(min=0),
        }
        hidden_BLH = body(**given).last_hidden_state
    assert values_BT.dtype == torch.float32
    for b, t in itertools.product(range(len(SIZES)), range(batch.longest)):
        if batch.mask_BT[b, t]:
            before_H = hidden_BLH[b, -batch.longest - 1 + t].double()
            want = before_H @ head.weight[0].double() + head.bias[0].double()
            assert values_BT[b, t].item() == pytest.approx(want.item(), abs=1e-6)


def test_rows_are_padded_with_zeros_behind_their_ends() -> None:
    whole = padded([torch.tensor([1.5, 2.5]), torch.tensor([3.5]), torch.tensor([4.5, 5.5, 6.5])], 4)
    assert whole.tolist() == [[1.5, 2.5, 0, 0], [3.5, 0, 0, 0], [4.5, 5.5, 6.5, 0]]
    assert padded([torch.ones(2, dtype=torch.bool)], 3).tolist() == [[True, True, False]]
    assert padded([torch.ones(2, dtype=torch.bool)], 3).dtype == torch.bool
