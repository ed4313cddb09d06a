"""`switchable generate`: text from a trained model, dense or sparse."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, given_flags
from switchable.coercion import build
from switchable.options import Precision

HELP = "write text with a trained model, dense or sparse"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an export")
    verb.add_argument(
        "--prompt",
        default="",
        help="text to continue; with <mask> (BERT) or <extra_id_0> (T5): blanks to fill",
    )
    verb.add_argument("--mode", choices=("dense", "sparse"), default="dense", help="how the FFNs multiply")
    verb.add_argument("--experts-per-token", type=int, metavar="K", help="experts per token in sparse mode")
    verb.add_argument(
        "--mass",
        type=float,
        metavar="SHARE",
        help="in sparse mode the fewest of the K experts whose shares add up to this, e.g. 0.9; 1 = all K",
    )
    verb.add_argument(
        "--max-new-tokens", type=int, default=100, help="tokens to write at most (default %(default)s)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.8, help="0 = most probable token (default %(default)s)"
    )
    verb.add_argument(
        "--top-k", type=int, default=50, help="draw among so many tokens; 0 = all (default %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    add_dataclass_flags(verb, Precision)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation; on stderr, how it was written and how fast."""
    asked = build(Precision, given_flags(args), "the flags").precision
    from switchable.ffn.convert import shown_mode
    from switchable.infer.generate import write
    from switchable.infer.precision import chosen_precision, multiplying_in
    from switchable.infer.sampling import Sampling
    from switchable.store.load import load_with_tokenizer

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    model, tokenizer = load_with_tokenizer(args.folder)
    precision = chosen_precision(model, asked)
    with multiplying_in(model, precision):
        text, tokens, seconds = write(
            model, tokenizer, args.prompt, args.mode, args.experts_per_token, sampling, args.mass
        )
    print(text)
    how = f"{shown_mode(model, args.mode)}, in {precision}"
    print(f"{how}: {tokens} tokens, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0
