"""Control: adapt a policy by policy gradients, with the derivatives that meta-gradients need.

Legend of shapes: M trajectories, H steps of each, S state, A action.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.tasks import prng
from metalearn.tasks.family import Net, TaskFamily
from metalearn.tasks.metrics import RETURN, Metric
from metalearn.tasks.types import Batch, Loss, Params, Query, Spec, Support

#: Added to the diagonal of the baseline's normal equations.
_RIDGE = 1e-3


class Environment(Protocol):
    """A batch of Markov decision processes. It changes nothing in place."""

    @property
    def horizon(self) -> int:
        """Return the largest number of steps of a trajectory."""

    def step(self, state: Tensor, action: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step: states [M, S], actions [M, A], and what distinguishes the task, y [M, …].

        Return next state [M, S], reward [M], and whether the trajectory ends here, bool [M].
        """


class Rollouts(NamedTuple):
    """Trajectories, without gradients: states [H, M, S], actions [H, M, A] and rewards [H, M].

    `alive` [H, M] is 1 until the end of a trajectory, then 0, as its rewards are.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor


@dataclasses.dataclass(frozen=True)
class PolicyGradient(TaskFamily):
    """Tasks of control, with a Gaussian policy: `net` computes its mean from a state.

    `x` of a support or query set holds the initial states, one for each trajectory, and `y` the
    task. Every loss samples its own trajectories, so each inner step has new ones.

    The loss is that of `surrogate`, with the advantages of a linear baseline (Duan et al. 2016).
    """

    environment: Environment  # the environment
    discount: float  # factor of the rewards of each later step
    dice_lambda: float  # see `surrogate`
    #: If true, advantages have mean 0 and variance 1 in each set of trajectories. The scale is a
    #: constant in the meta-gradient.
    standardise: bool
    initial_log_std: float  # initial logarithm of the standard deviation of actions

    target: str = "control"
    metric: Metric = RETURN
    predicts: bool = False

    def init(self, spec: Spec, key: Tensor) -> Params:
        """Create the logarithm of the policy's standard deviation, [A]."""
        return {"log_std": torch.full((spec.way,), self.initial_log_std, device=key.device)}

    def support_loss(self, net: Net, params: Any, support: Support, key: Tensor) -> Tensor:
        rollouts = self.rollouts(net, params, support, prng.fold_in(key, 0))
        return self._loss(net, params, rollouts)[0]

    def query_loss(self, net: Net, params: Any, query: Query | Batch, key: Tensor) -> Loss:
        rollouts = self.rollouts(net, params, query, prng.fold_in(key, 1))
        value, statistics = self._loss(net, params, rollouts)
        score = self.metric.of(rollouts.rewards, query.y)
        # The surrogate is 0 up to rounding; only its derivatives matter.
        return Loss(value, {"loss": value.detach() - score, self.metric.name: score}, statistics)

    def score(self, net: Net, params: Any, query: Query, key: Tensor) -> Tensor:
        rollouts = self.rollouts(net, params, query, prng.fold_in(key, 2))
        return self.metric.of(rollouts.rewards, query.y)

    @torch.no_grad()
    def rollouts(
        self, net: Net, params: Any, part: Support | Query | Batch, key: Tensor
    ) -> Rollouts:
        """Sample one trajectory for each initial state of `part`; key: int64 []."""
        params = pytree.tree_map(torch.detach, params)
        std, state = params["head.log_std"].exp(), part.x
        shape = (self.environment.horizon, len(state), len(std))
        noise = std * prng.normal(key, shape).to(state.dtype)
        alive, steps = torch.ones_like(state[:, 0]), []
        for each in noise:
            action = net(params, state)[0] + each
            after, reward, has_ended = self.environment.step(state, action, part.y)
            steps.append((state, action, alive * reward, alive))
            state, alive = after, alive * ~has_ended
        return Rollouts(*(torch.stack(values) for values in zip(*steps, strict=True)))

    def log_probabilities(self, net: Net, params: Any, rollouts: Rollouts) -> tuple[Tensor, Params]:
        """Compute log p(action | state) [H, M] up to a constant, and normalisation statistics."""
        mean, statistics = net(params, rollouts.states.flatten(0, 1))
        log_std = params["head.log_std"]
        deviation = (rollouts.actions - mean.view_as(rollouts.actions)) * (-log_std).exp()
        return -(deviation.square() / 2 + log_std).sum(-1), statistics

    def _loss(self, net: Net, params: Any, rollouts: Rollouts) -> tuple[Tensor, Params]:
        log_p, statistics = self.log_probabilities(net, params, rollouts)
        advantages = self.advantages(rollouts)
        return surrogate(log_p * rollouts.alive, advantages, self.dice_lambda), statistics

    @torch.no_grad()
    def advantages(self, rollouts: Rollouts) -> Tensor:
        """Compute discounted rewards to go minus a linear baseline of state and time, [H, M].

        The baseline is fitted to the trajectories themselves, by least squares.
        """
        states, _, rewards, alive = rollouts
        horizon, count = rewards.shape
        to_go = _powers(self.discount, rewards).T @ rewards
        time = torch.arange(horizon, device=rewards.device).to(rewards.dtype) / horizon
        time = time[:, None, None].expand(-1, count, 1)
        parts = [states, states.square(), time, time.square(), time**3, torch.ones_like(time)]
        features = (torch.cat(parts, -1) * alive[..., None]).flatten(0, 1)
        ridge = _RIDGE * torch.eye(features.shape[1], dtype=rewards.dtype, device=rewards.device)
        weights = torch.linalg.solve_ex(
            features.T @ features + ridge, features.T @ (to_go * alive).flatten()
        )[0]
        advantages = (to_go - (features @ weights).view_as(to_go)) * alive
        if not self.standardise:
            return advantages
        steps = alive.sum()
        centred = (advantages - advantages.sum() / steps) * alive
        return centred * torch.rsqrt(centred.square().sum() / steps + 1e-8)


def surrogate(log_p: Tensor, advantages: Tensor, dice_lambda: float = 1.0) -> Tensor:
    """Compute a loss [] whose derivatives are those of minus the expected return, per step.

    -mean(A_t (exp(w_t - |w_t|) - exp(v_t - |v_t|))) with w_t = sum_{j <= t} lambda^(t-j) log p_j,
    v_t = w_t - log p_t and |.| without gradient: Loaded DiCE (Farquhar et al. 2019). With
    lambda = 1 it is DiCE (Foerster et al. 2018) with advantages, and derivatives of every order are
    right in expectation. Less gives second derivatives less variance and a bias; 0 is LVC (Rothfuss
    et al. 2019). First derivatives do not depend on it. Log-probabilities and advantages (without
    gradient) are [H, M], 0 after the end of a trajectory.
    """
    past = _powers(dice_lambda, log_p) @ log_p
    before = past - log_p
    weights = (past - past.detach()).exp() - (before - before.detach()).exp()
    return -(weights * advantages).mean()


def _powers(base: float, like: Tensor) -> Tensor:
    """Return base^(i - j) for j <= i, else 0: [H, H] for `like` [H, M]."""
    index = torch.arange(len(like), device=like.device)
    distance = index[:, None] - index
    return torch.where(distance >= 0, base ** distance.clamp_min(0).to(like.dtype), 0.0)
