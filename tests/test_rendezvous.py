"""Where the processes of a run meet."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.rendezvous import address_towards, without_prefix


def test_the_address_towards_a_host():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(UserError, match=r"^no\.such\.host\.invalid cannot be reached from .* give an"):
        address_towards("no.such.host.invalid")


def test_keys_without_prefixes_are_those_of_the_store_behind():
    store = dist.HashStore()
    prefixed = dist.PrefixStore("ranks", dist.PrefixStore("attempt", store))
    without_prefix(prefixed).set("key", "value")
    assert store.get("key") == b"value" and not prefixed.check(["key"])
    assert without_prefix(store) is store and without_prefix(None) is None
