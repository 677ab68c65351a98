"""Ranks under torchrun: torch.distributed between them, and the model sharded over them by FSDP2.

Collectives on the model's device (weights, gradients) are FSDP2's own; rollouts, rewards and metrics are small and go
through gloo. Which rank failed is told through the store that torchrun's agent keeps, which outlives any of them.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from srft.config import ModelConfig
from srft.data import Example
from srft.errors import UserError
from srft.model import LoadedModel
from srft.ranks.ranks import Ranks
from srft.rewards import Rewards, Scorer
from srft.rollout import Engine, Rollout

T = TypeVar("T")
ENDS = (signal.SIGTERM, signal.SIGHUP)
PATIENCE = 3.0  # seconds in which every living rank answers once one of them has failed


class TorchRanks(Ranks):
    """The ranks of a torchrun, joined: one process group, and silence on all ranks but the first."""

    def __init__(self, quiet: bool = True):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available() and self.local < torch.cuda.device_count():
            torch.cuda.set_device(self.local)
        dist.init_process_group()  # gloo for what lies on the CPU, NCCL for GPUs
        agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store = dist.PrefixStore("srft", agent)
        self.owners: dict[nn.Module, Owner] = {}  # of each model that is sharded
        self.telling = threading.Lock()
        self.stands_in = False  # whether this rank writes what the first one cannot
        self._listen()
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            sys.stderr = sys.stdout if quiet else sys.stderr

    def check(self, config: ModelConfig) -> None:
        if config.device.startswith("cuda:"):
            raise UserError(f"model.device: {config.device!r} is one GPU for all ranks; give cuda: each takes its own")
        count = torch.cuda.device_count()
        if config.device != "cpu" and torch.cuda.is_available() and self.local >= count:
            raise UserError(f"torchrun: more processes than GPUs on a node; lower --nproc_per_node to {count}")

    def gather(self, value: T) -> list[T]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def concatenate(self, *parts: Tensor) -> tuple[Tensor, ...]:
        of_ranks = self.gather([part.cpu() for part in parts])  # a pickled GPU tensor would come back on that GPU
        return tuple(torch.cat(each).to(parts[0].device) for each in zip(*of_ranks))

    def add(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def engine(self, engine: Engine, loaded: LoadedModel) -> Engine:
        return DividedEngine(engine, self, loaded)

    def scorer(self, scorer: Scorer) -> Scorer:
        return DividedScorer(scorer, self)

    # The model

    def shard(self, loaded: LoadedModel) -> None:
        """Weights become DTensors, sharded in dimension 0, in fp32 where they are trained; layers and the rest are
        gathered in the model's type.

        One group per transformer block, and one for everything else (embedding, final norm, head), tied or not.
        Gradients are summed in fp32: token weights are already those of the whole step.
        """
        model = loaded.model
        mesh = init_device_mesh(loaded.device.type, (self.size,))
        policy = MixedPrecisionPolicy(loaded.dtype, torch.float32, cast_forward_inputs=False)
        names = model._no_split_modules or ()
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        owner = self.owners[model] = Owner(model)
        for module in [*reversed(blocks), owner]:
            for weight in module.parameters():
                if weight.requires_grad and not isinstance(weight, DTensor):
                    weight.data = weight.data.float()
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def forward(self, loaded: LoadedModel, function: Callable[[], T]) -> T:
        return self.owners[loaded.model](function)

    @torch.no_grad()
    def whole(self, loaded: LoadedModel, function: Callable[[], T]) -> T:
        """Gathers everything first: ranks that generate for different numbers of steps must not wait for each other."""
        owner = self.owners[loaded.model]
        groups = [module for module in owner.modules() if isinstance(module, FSDPModule)]

        def gathered() -> T:
            for group in groups:
                group.unshard()
            return function()

        owner.set_reshard_after_forward(False)
        result = owner(gathered)
        for group in groups:
            group.set_reshard_after_forward(group is not owner, recurse=False)
            group.reshard()
        return result

    def weights(self, loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in loaded.model.state_dict(keep_vars=True).items():
            yield name, self._gathered(tensor, loaded.dtype)

    def state_dict(self, loaded: LoadedModel) -> dict[str, Tensor] | None:
        """One weight after the other is gathered; a tied one once, so that it is still known as such."""
        state = loaded.model.state_dict(keep_vars=True)
        if loaded.adapters:
            state = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
        whole = {}
        for tensor in state.values():
            if id(tensor) not in whole:
                full = self._gathered(tensor, tensor.dtype if loaded.adapters else loaded.dtype)
                whole[id(tensor)] = full.cpu() if self.main else None
        return {name: whole[id(tensor)] for name, tensor in state.items()}

    @staticmethod
    def _gathered(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.detach().to(dtype).full_tensor() if isinstance(weight, DTensor) else weight.detach()

    # The end

    def fail(self, message: str, code: int, error: BaseException | None = None) -> NoReturn:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        self._end(code, self._name_the_lost if lost else lambda: self._tell(message))

    def leave(self, code: int = 0) -> NoReturn:
        """Ends the process itself: in the interpreter's own end torch's threads abort now and then (2.13, gloo)."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _end(self, code: int, tell: Callable[[], None]) -> NoReturn:
        """Ends the process at once: on its way out it would wait for ranks that are gone."""
        said = ""
        try:
            tell()
            said = self.store.get("said").decode() if self.store.check(["said"]) else said
        except dist.DistError:
            gone = f"srft: error: {os.environ['MASTER_ADDR']}, where the ranks meet, does not answer"
            print(gone + self.last_words, file=sys.__stderr__, flush=True)
        if self.on_end and (self.main or self.stands_in):
            with contextlib.suppress(Exception):  # must not hide what ended the run
                self.on_end(said)
        os._exit(code)

    def _tell(self, message: str) -> None:
        if self.store.add("told", 1) == 1:
            bar = "\n" if self.last_words else ""  # of a run under way: the message must not be written behind it
            print(bar + message + self.last_words, file=sys.__stderr__, flush=True)
            self.store.set("said", message)
        else:  # torchrun stops all ranks as soon as one ends: not before the message is out
            self._wait(lambda: self.store.check(["said"]))

    def _name_the_lost(self) -> None:
        """A rank that failed has told why, or was killed: whoever answers in time is alive, the others are named."""
        with self.telling:
            self.store.set(f"alive/{self.rank}", "")
            self._wait(lambda: self._told() or not self._silent())
            silent = self._silent()
            if self._told():
                self._tell("")
            elif self.rank == min(set(range(self.size)) - set(silent)):
                self.stands_in = 0 in silent
                names = " and ".join(f"rank {rank}" for rank in silent)
                ended = f"{names} of {self.size} ended without a word (killed, out of memory, or its machine is gone)"
                self._tell(f"srft: error: {ended if silent else 'stopped by a signal'}")

    def _told(self) -> bool:
        return self.store.add("told", 0) > 0

    def _silent(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.store.check([f"alive/{rank}"])]

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not condition():
            time.sleep(0.02)

    def _listen(self) -> None:
        """torchrun ends ranks by SIGTERM, or by the SIGHUP that it got; heard while the main thread waits for a GPU."""
        reader, self.signals = socket.socketpair()
        self.signals.setblocking(False)
        for number in ENDS:
            signal.signal(number, lambda *_: None)  # a signal without a handler is not written anywhere
        signal.set_wakeup_fd(self.signals.fileno(), warn_on_full_buffer=False)

        def end() -> None:
            while reader.recv(1)[0] not in ENDS:
                pass
            self._end(1, self._name_the_lost)

        def forget() -> None:
            signal.set_wakeup_fd(-1)
            for number in ENDS:
                signal.signal(number, signal.SIG_DFL)

        os.register_at_fork(after_in_child=forget)  # a reward may run processes of its own
        threading.Thread(target=end, daemon=True).start()


class Owner(nn.Module):
    """The module that owns every weight outside of the blocks; runs a function inside of its forward.

    FSDP2 has a module's own weights whole, and reduces their gradients, only for what happens in its forward. So the
    loss head is called there, with the very tensor that the embedding used where they are tied.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


@dataclass(frozen=True)
class DividedEngine(Engine):
    """Rank r generates for prompts r, r + K, …: the samples are those of one process, which numbers prompts alike."""

    alone: Engine
    ranks: TorchRanks
    loaded: LoadedModel

    def generate(self, prompts: list[list[int]], samples: int, **settings: Any) -> list[list[Rollout]]:
        numbers = range(self.ranks.rank, len(prompts), self.ranks.size)
        mine = [prompts[number] for number in numbers]

        def generate() -> list[list[Rollout]]:
            return self.alone.generate(mine, samples, numbers=numbers, **settings)

        groups = self.ranks.whole(self.loaded, generate) if self.alone.needs_model else generate()
        merged: list[list[Rollout]] = [[] for _ in prompts]
        for rank, part in enumerate(self.ranks.gather(groups)):
            merged[rank :: self.ranks.size] = part
        return merged

    def refresh(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.alone.refresh(weights)

    def release(self) -> None:
        self.alone.release()


@dataclass(frozen=True)
class DividedScorer:
    """Calls the reward function on each rank, with the completions of every K-th example."""

    alone: Scorer
    ranks: TorchRanks

    @property
    def name(self) -> str:
        return self.alone.name

    @property
    def needs_answer(self) -> bool:
        return self.alone.needs_answer

    def __call__(self, examples: list[Example], completions: list[str], **lists: list | None) -> Rewards:
        place: dict[int, int] = {}
        for example in examples:
            place.setdefault(id(example), len(place))
        mine = [i for i, each in enumerate(examples) if place[id(each)] % self.ranks.size == self.ranks.rank]
        own = {name: of and [of[i] for i in mine] for name, of in lists.items()}
        scored = self.alone([examples[i] for i in mine], [completions[i] for i in mine], **own)
        merged = {}
        for part in self.ranks.gather(dict(zip(mine, zip(scored, scored.details)))):
            merged |= part
        return Rewards(*zip(*(merged[i] for i in range(len(examples)))))
