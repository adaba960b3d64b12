"""Check methods that read the support set as a set or a sequence, in float64."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from metalearn.algorithms.in_context import InContext, equiangular
from metalearn.algorithms.snail import SNAIL
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.family import supervised
from metalearn.tasks.types import Spec
from tests.fixtures import to_float64
from tests.one_task import COMMON, IDENTITY, KEY, init_state, make_task, predictions
from tests.test_more_heads import changed

_HEAD: dict[str, Any] = COMMON | {"backbone": IDENTITY}
_IN_CONTEXT: dict[str, Any] = _HEAD | {"layers": 2, "width": 8, "heads": 2}


def encoder(params, layers=2, width=8, heads=2):
    """Return torch's own transformer with these weights."""
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
    )
    last = torch.nn.LayerNorm(width)
    module = torch.nn.TransformerEncoder(layer, layers, last, enable_nested_tensor=False).double()
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "up.",
             "linear2.": "down.", "norm1.": "attend.", "norm2.": "feed."}  # fmt: skip
    weights = {f"norm.{part}": params[f"head.last.{part}"] for part in ("weight", "bias")}
    for number in range(layers):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                value = params[f"head.layer{number}.{ours}{part}"]
                weights[f"layers.{number}.{theirs}{part}"] = value
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("codes", [None, 6])
def test_in_context_reads_a_query_among_examples_with_label_codes(codes):
    algorithm = InContext(**_IN_CONTEXT, codes=codes)
    task, state = make_task(), changed(init_state(algorithm))
    params, count = state.params, codes or 3
    # Vertices of a regular simplex: orthogonal unit vectors, minus their mean, with length 1.
    simplex = F.normalize(torch.eye(count).double() - 1 / count, dim=1)
    order = prng.permutation(KEY, count)[:3].tolist()
    expected = []
    for x in task.query.x:
        rows = [torch.cat([x, params["head.unknown"]])]
        for example, y in zip(task.support.x, task.support.y.tolist(), strict=True):
            rows.append(torch.cat([example, simplex[order[y]]]))
        tokens = torch.stack(rows) @ params["head.token"].T
        output = encoder(params)(tokens[None])[0, 0]
        expected.append(torch.stack([params["head.output"][one] @ output for one in order]))
    torch.testing.assert_close(predictions(algorithm, state, task), torch.stack(expected))


def test_codes_have_length_one_and_the_largest_equal_angle():
    codes = equiangular(5, torch.device("cpu"))
    expected = torch.full((5, 5), -0.25) + 1.25 * torch.eye(5)  # no 5 vectors have a smaller cosine
    torch.testing.assert_close(codes @ codes.T, expected)


def test_codes_differ_from_task_to_task_and_must_be_enough():
    algorithm = InContext(**_IN_CONTEXT, codes=6)
    task, state = make_task(), init_state(algorithm)
    chosen = {
        tuple(
            algorithm.learn(state.params, task.support.x, task.support, prng.key_of(n))
            .outputs.tolist()
        )
        for n in range(50)
    }  # fmt: skip
    assert {one for order in chosen for one in order} == set(range(6))
    assert all(len(set(order)) == 3 for order in chosen)
    assert not algorithm.fixed_way
    more = dataclasses.replace(task.support, way=7)
    with pytest.raises(UserError, match=r"algo.codes=6: should be at least 7, the number of cl"):
        algorithm.adapt(state, more, key=KEY)
    with pytest.raises(UserError, match=r"algo.codes=2: should be at least 3, the number of cl"):
        init_state(dataclasses.replace(algorithm, codes=2))
    with pytest.raises(UserError, match=r"algo.heads=3: should divide algo.width=8"):
        init_state(dataclasses.replace(algorithm, heads=3))


def test_in_context_reads_values_as_they_are():
    algorithm = InContext(**_IN_CONTEXT, codes=None, family=supervised("value"))
    task = make_task()
    values = dataclasses.replace(task.support, y=task.support.x[:, :2].sin(), way=2)
    task = dataclasses.replace(task, support=values)
    state = changed(to_float64(algorithm.init(Spec((4,), 2, 0, "value"), prng.key_of(0))))
    params = state.params
    query = torch.cat([task.query.x, params["head.unknown"].expand(12, -1)], 1)
    examples = torch.cat([values.x, values.y], 1)
    tokens = [torch.cat([row[None], examples]) @ params["head.token"].T for row in query]
    expected = encoder(params)(torch.stack(tokens))[:, 0] @ params["head.output"].T
    torch.testing.assert_close(predictions(algorithm, state, task), expected)


def test_snail_requires_values_for_each_attention_block():
    algorithm = SNAIL(**_HEAD, filters=5, dense_blocks=3, keys=[3, 4], values=[2])
    with pytest.raises(UserError, match=r"algo.values=\[2\]: .* each of algo.keys=\[3, 4\]"):
        init_state(algorithm)


def sequence(task):
    """Return the support set in the order in which methods with KEY read it."""
    order = prng.permutation(KEY, len(task.support.y))
    return task.support.x[order], F.one_hot(task.support.y[order], 3).double()


def test_snail_equals_causal_convolutions_over_one_sequence_per_query():
    algorithm = SNAIL(**_HEAD, filters=5, dense_blocks=3, keys=[3, 4], values=[2, 6])
    task, state = make_task(), changed(init_state(algorithm))

    def parameters(name):
        return state.params[f"head.{name}.weight"], state.params[f"head.{name}.bias"]

    def attention(name, h, keys):
        q, k, v = F.linear(h, *parameters(name)).tensor_split([keys, 2 * keys], 1)
        reads = []
        for t in range(len(h)):
            share = torch.stack([q[t] @ k[s] / keys**0.5 for s in range(t + 1)]).softmax(0)
            reads.append(torch.stack([share[s] * v[s] for s in range(t + 1)]).sum(0))
        return torch.cat([h, torch.stack(reads)], 1)

    def dense(name, h, dilation):
        weight, bias = parameters(name)
        kernel = torch.stack(weight.chunk(2, 1), -1)  # [2 filters, channels, 2]
        padded = F.pad(h.T[None], (dilation, 0))
        a, b = F.conv1d(padded, kernel, bias, dilation=dilation)[0].T.chunk(2, 1)
        return torch.cat([h, a.tanh() * b.sigmoid()], 1)

    x, y = sequence(task)
    expected = []
    for query in task.query.x:
        h = torch.cat([torch.cat([x, query[None]]), F.pad(y, (0, 0, 0, 1))], 1)
        h = attention("attention0", h, 3)
        for number, dilation in enumerate((1, 2, 4)):
            h = dense(f"tc1.{number}", h, dilation)
        h = attention("attention1", h, 4)
        expected.append(F.linear(h[-1], *parameters("output")))
    torch.testing.assert_close(predictions(algorithm, state, task), torch.stack(expected))
