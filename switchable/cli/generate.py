"""`switchable generate`: text from a trained model, dense or sparse."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, given
from switchable.errors import InputError
from switchable.options import Precision, refuse_without_sparse

HELP = "write text with a trained model, dense or sparse"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an export")
    verb.add_argument(
        "--prompt",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="text to continue; with <mask> (BERT) or <extra_id_0> (T5): blanks to fill; several are one batch",
    )
    verb.add_argument("--mode", choices=("dense", "sparse"), default="dense", help="how the FFNs multiply")
    verb.add_argument("--experts-per-token", type=int, metavar="K", help="experts per token in sparse mode")
    verb.add_argument(
        "--mass",
        type=float,
        metavar="SHARE",
        help="in sparse mode the fewest of the K experts whose shares add up to this, e.g. 0.9; 1 = all K",
    )
    verb.add_argument("--max-new-tokens", type=int, default=100, help="most new tokens (default %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0 = likeliest (default %(default)s)")
    verb.add_argument(
        "--top-k", type=int, default=50, help="draw among so many tokens; 0 = all (default %(default)s)"
    )
    verb.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="end before one of these (causal models)"
    )
    verb.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    add_dataclass_flags(verb, Precision)
    verb.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="what the weights are read as: the narrower, the faster (default: the precision's)",
    )


def run(args: argparse.Namespace) -> int:
    """Print each prompt and its continuation, one prompt's as it comes; on stderr, how it was written and how fast."""
    asked = given(Precision, args).precision
    if asked is not None and args.weights not in (None, asked):
        raise InputError(
            f"--weights {args.weights} and --precision {asked} differ; give --weights alone, sums are float32 anyway"
        )
    refuse_without_sparse([args.mode], experts_per_token=args.experts_per_token, mass=args.mass)
    if "" in args.stop:
        raise InputError("--stop '' would end every text at once; give one character or more")
    from switchable.ffn.convert import set_mode, shown_mode
    from switchable.infer.generate import decoding, width_of, write_each
    from switchable.infer.precision import chosen_precision, multiplying_in
    from switchable.infer.sampling import Sampling
    from switchable.progress import say
    from switchable.store.quantised import load_int8

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    quantised = load_int8(args.folder, args.mode, sampling) if args.weights == "int8" else None
    if quantised is None:
        # Of transformers' models, which an export in 8 bits does without: 0.2 GB.
        from switchable.store.load import load_with_tokenizer

        model, tokenizer, stored = *load_with_tokenizer(args.folder), None
    else:
        model, tokenizer, stored = quantised
    weights = args.weights or width_of(chosen_precision(model, asked))
    precision = "float32" if weights == "float32" else "bfloat16"
    set_mode(model, args.mode, args.experts_per_token, args.mass)
    ready, why_not = decoding(model, weights, args.mode, sampling, stored)
    how = f"{shown_mode(model, args.mode)}, in {weights}"
    if why_not is not None:
        what = f"transformers' generate writes, in {precision}"
        say(f"{args.folder}: {what}; our own decoding is not for it: it {why_not}")
    with multiplying_in(model, precision) if why_not is not None else nullcontext():
        found = write_each(
            ready, tokenizer, args.prompt, args.mode, args.experts_per_token, sampling, args.stop, _show
        )
    print("" if len(found) == 1 else "\n\n".join(each.text for each in found))
    tokens, seconds = sum(each.tokens for each in found), found[0].seconds
    print(f"{how}: {tokens} tokens, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)
