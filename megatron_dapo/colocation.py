"""Engines and policy on the same devices take turns (rollout.sleep): either has the memory while the other
has given its own back. Where they do not, nothing here does anything but measure.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_dapo.controller import Controller
from megatron_dapo.policy.offload import memory_now, to_device, to_host
from megatron_dapo.policy.session import Session
from megatron_dapo.policy.step import Policy


class Colocation:
    """Hands the devices over. Both methods are collective.

    controller: rank 0's, None on the others. memory: GiB of its device that this rank kept at the end of the
    policy's last turn, and keeps while the engines have theirs.
    """

    def __init__(self, session: Session, controller: Controller | None, *, takes_turns: bool) -> None:
        self.takes_turns = takes_turns
        self.memory: dict[str, float] = {}
        self._session, self._controller = session, controller
        self._said: set[str] = set()

    def to_policy(self, policy: Policy | None) -> None:
        """The engines fall asleep; then the policy's state comes back, if there is a policy already."""
        if not self.takes_turns:
            return
        if self._controller:
            self._controller.service.fall_asleep()
        self._session.channel.share()  # no engine holds memory now, however long that took
        self._measure("the engines sleep")
        if policy:
            to_device(policy)
            self._measure("optimizer state and gradients are back")

    def to_engines(self, policy: Policy) -> None:
        """The policy's state leaves; then the engines get room for weights. A push must follow."""
        self.memory["policy_training"] = self._measure("the policy's turn ends")
        if self.takes_turns:
            to_host(policy)
            dist.barrier(group=self._session.control)  # of every rank: an engine is on devices of several
            self._measure("optimizer state and gradients have left")
            if self._controller:
                self._controller.service.wake_weights()
        self.memory["policy_sampling"] = self._measure("the engines have room for weights")

    def _measure(self, event: str) -> float:
        """GiB that no other process can have; rank 0 says so when `event` happens for the first time."""
        memory = memory_now(self._session.device)
        if self.takes_turns and self._controller and event not in self._said:
            self._said.add(event)
            self._controller.reporter.message(f"{event}: rank 0 has {memory}")
        return memory.reserved
