"""The command loft-fast store: requests that are on record, and can be checked."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loft_fast import files
from loft_fast.cli_tools import (
    check_outputs,
    check_solving,
    check_weights,
    finds_angle,
    key_of,
    load_model,
    solving,
    write_weights,
)
from loft_fast.errors import InputError, MissingExtraError, StoreError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.sites import find_site
from loft_fast.store import Entry, UnlearningStore
from loft_fast.unlearn import predicting_head

_LARGEST = 2**28  # bytes of a receipt; one of a request for a million rows has 74 million


def add_store(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `store` to the commands."""
    store = commands.add_parser("store", help="exact moments, projection and ledger in one folder")
    parts = store.add_subparsers(required=True, metavar="ACTION")

    def command(name: str, run: Callable[..., Any], about: str, *parents: argparse.ArgumentParser) -> Any:
        parser = parts.add_parser(name, parents=[common, *parents], help=about)
        parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
        parser.set_defaults(run=run)
        return parser

    init = command("init", _init, "make a store from moments")
    init.add_argument("moments", type=Path, help="file that fetch --exact wrote, with groups")
    init.add_argument("--model", metavar="MODEL", help="module:name; other models are then refused")
    init.add_argument("--min-rows", type=int, default=1, metavar="N", help="smallest group to keep (default: 1)")
    init.add_argument("--keep-forgotten", action="store_true", help="keep the moments of what was forgotten")

    forget = command("forget", _forget, "forget groups, and write that down", solving())
    forget.add_argument("keys", nargs="+", metavar="KEY", help="groups to forget")
    forget.add_argument("--id", help="of the request; a second one of the same id changes nothing")
    forget.add_argument("--out", type=Path, help="projection file to write as well")

    command("ledger", _ledger, "all requests")

    receipt = command("receipt", _receipt, "a signed receipt of a request")
    receipt.add_argument("id", metavar="ID", help="of the request")
    receipt.add_argument("--out", type=Path, help="JSON file to write (default: print it)")

    verify = command("verify", _verify, "check all files against each other")
    verify.add_argument("receipt", type=Path, nargs="?", help="and this receipt against the ledger")

    undo = command("undo-check", _undo_check, "check that a request took away these moments and nothing else")
    undo.add_argument("id", metavar="ID", help="of the request")
    undo.add_argument("moments", type=Path, help="file of the moments before it, or of what it forgot")


def _init(options: argparse.Namespace) -> tuple[Any, str]:
    model = None if options.model is None else load_model(options.model)
    moments = GroupedMoments.load(options.moments)
    with UnlearningStore.create(
        options.store, moments, model, min_rows=options.min_rows, keep_forgotten=options.keep_forgotten
    ) as store:
        found = {"store": str(options.store), **store.verify()}
        with contextlib.suppress(MissingExtraError):  # without it there are no receipts to verify
            found["public_key"] = store.public_key
    words = f"store {options.store}: {found['groups']} groups, {found['rows']} rows of {moments.dim} features"
    return found, words + (f"\npublic key {found['public_key']}" if "public_key" in found else "")


def _forget(options: argparse.Namespace) -> tuple[Any, str]:
    check_solving(options, STORE=options.store)
    model = None if options.model is None else load_model(options.model)
    with UnlearningStore(options.store) as store:
        retained = store.moments
        head = None
        if model is not None and options.weights is not None:
            check_weights(model, store.site, retained.dim)
            head = predicting_head(model, find_site(model, store.site), retained)
        entry = store.forget(
            [key_of(text, lambda key: key in retained or store.forgot(key)) for text in options.keys],
            options.id,
            model=model,
            rank=options.rank,
            about=options.about,
            erase=options.erase,
            close=head is not None and finds_angle(options),
            min_retain_kept=options.min_retain_kept,
        )
        projection = store.projection
        closed = [] if head is None else list(filter(store.forgot, range(head.out_features)))
    assert projection is not None
    if options.out is not None:
        projection.save(options.out)
    if options.weights is not None:
        assert model is not None
        write_weights(options.weights, model, projection, closed)
    return asdict(entry), f"{_line(entry)}\n{projection.certificate}"


def _ledger(options: argparse.Namespace) -> tuple[Any, str]:
    with UnlearningStore(options.store) as store:
        entries = list(store.ledger())
    return [asdict(entry) for entry in entries], "\n".join(map(_line, entries))


def _receipt(options: argparse.Namespace) -> tuple[Any, str]:
    check_outputs({"--out": options.out}, STORE=options.store)
    with UnlearningStore(options.store) as store:
        receipt = store.receipt(options.id)
    text = json.dumps(receipt, indent=2)
    if options.out is None:
        return receipt, text
    files.write_bytes(options.out, text.encode())
    return receipt, f"receipt of request {options.id} in {options.out}"


def _verify(options: argparse.Namespace) -> tuple[Any, str]:
    receipt = None if options.receipt is None else _read_receipt(options.receipt)
    with UnlearningStore(options.store) as store:
        found = store.verify(receipt, progress=not options.quiet)
    words = f"in order: {found['entries']} entries, {found['groups']} groups, {found['rows']} rows retained"
    if receipt is not None:
        words += f"\nthe receipt is that of request {receipt['entry']['id']}, number {receipt['entry']['number']}"
    return found, words


def _undo_check(options: argparse.Namespace) -> tuple[Any, str]:
    given = GroupedMoments.load(options.moments)
    with UnlearningStore(options.store) as store:
        undone = store.undo_check(options.id, given)
        if not undone:  # or the file is of the moments before: what is not retained any more, then, is what went
            with contextlib.suppress(InputError):  # it is not
                undone = store.undo_check(options.id, given - store.moments)
    if not undone:
        raise StoreError(f"{options.moments}: with these moments added, the state is not that before {options.id!r}")
    words = f"request {options.id} and those after it took away these rows and nothing else"
    return {"id": options.id, "undone": True}, words


def _line(entry: Entry) -> str:
    what = "created with" if entry.action == "create" else f"{len(entry.subjects)} {entry.action} forgotten,"
    return f"{entry.number:>6}  {entry.time}  {entry.id}  {what} {entry.count} rows  {entry.hash[:16]}"


def _read_receipt(path: Path) -> dict[str, Any]:
    try:
        receipt = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"receipt: cannot read {str(path)!r}: {error}") from error
    if not isinstance(receipt, dict):
        raise InputError(f"receipt: {str(path)!r} is none")
    return receipt
