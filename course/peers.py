#!/usr/bin/env python3
"""vLLM on the rows of bench.py, for a table beside our figures.

    python course/peers.py --json course/peers-h200.json        all rows that vLLM can run
    python course/peers.py decode                               some rows

Any installed version of vLLM will do, in a virtual environment that has the packages of requirements.txt
as well. Run bench.py on the same card: only figures of one card stand side by side.
"""
import datetime
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import tinyvllm
from tinyvllm import EngineArgs, TinyVLLMError

STEPS = 64                              # of a decode row


def seconds_of_life():
    """The time since this process was started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[19]) / os.sysconf("SC_CLK_TCK")          # since the machine's start
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


class Peer:
    """vLLM, ready to measure rows."""

    def __init__(self, folder, load_format, longest, vocab_size):
        """folder: of the model. longest: tokens of prompt and answer together."""
        try:
            import torch
            import vllm
        except ImportError as error:
            raise TinyVLLMError(f"vLLM: expected it in this Python, got {error}: use a virtual environment "
                                "that has vLLM and the packages of requirements.txt") from None
        self.vllm = vllm
        self.vocab_size = vocab_size
        self.llm = vllm.LLM(model=str(folder), load_format=load_format, dtype="bfloat16",
                            skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=256,
                            enable_prefix_caching=True, generation_config="vllm")
        self.facts = {"card": {"name": torch.cuda.get_device_name()}, "engine": "vLLM",
                      "version": vllm.__version__, "date": datetime.date.today().isoformat()}

    def prompt(self, count):
        """`count` random token ids."""
        return [random.randrange(self.vocab_size) for _ in range(count)]

    def seconds(self, prompts, counts, params):
        """The time for prompts with so many new tokens each. params: of SamplingParams."""
        params = {name: value for name, value in params.items() if name != "seed"}      # would slow vLLM
        all_params = [self.vllm.SamplingParams(**{"temperature": 0.0} | params, max_tokens=count,
                                               ignore_eos=True, detokenize=False) for count in counts]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, all_params, use_tqdm=False)
        seconds = time.perf_counter() - start
        got = [len(output.outputs[0].token_ids) for output in outputs]
        assert got == list(counts), f"expected {counts} new tokens, got {got}"
        return seconds


def measure_decode(peer, row):
    """A decode step: the difference of STEPS + 1 new tokens and one new token, with cached prompts."""
    prompts = [peer.prompt(prompt) for prompt, _ in row.requests]
    peer.seconds(prompts, [1] * len(prompts), row.params)
    one = peer.seconds(prompts, [1] * len(prompts), row.params)
    all_steps = peer.seconds(prompts, [STEPS + 1] * len(prompts), row.params)
    return {"value": 1e3 * (all_steps - one) / STEPS, "unit": "ms"}


def measure_run(peer, row):
    """Tokens a second of a whole run."""
    prompts = [peer.prompt(prompt) for prompt, _ in row.requests]
    seconds = peer.seconds(prompts, [new for _, new in row.requests], row.params)
    return {"value": row.num_tokens / seconds, "unit": "tokens/s"}


def measure_shared_prefix(peer, row):
    """The time until all requests behind a cached prefix have their first token."""
    shared = row.setup["shared"]
    prefix = peer.prompt(shared)
    peer.seconds([prefix + peer.prompt(1)], [1], {})
    prompts = [prefix + peer.prompt(prompt - shared) for prompt, _ in row.requests]
    return {"value": 1e3 * peer.seconds(prompts, [1] * len(prompts), {}), "unit": "ms"}


MEASURES = {bench.measure_decode: measure_decode, bench.measure_run: measure_run,
            bench.measure_shared_prefix: measure_shared_prefix}


def chosen_rows(name):
    """{name: row} of a row, a group or all, as far as vLLM can run them: no switch, no small pool."""
    return {key: row for key, row in bench.chosen_rows(name).items()
            if row.measure in MEASURES and not row.setup.keys() & {"off", "pool"}}


def main(argv=None):
    """Measures rows, and prints and writes them; returns the exit code."""
    parser = tinyvllm.ArgumentParser(prog="peers.py", description="Measure vLLM's speed on bench.py's rows.")
    parser.add_argument("row", nargs="?", metavar="ROW", help="a row or a group of bench.py (default: all)")
    parser.add_argument("--model", default="llama-3.2-1b", help="as for bench.py (default: %(default)s)")
    parser.add_argument("--load-format", default="dummy", choices=("auto", "dummy"))
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    args = parser.parse_args(argv)
    rows = chosen_rows(args.row)
    if args.json:
        tinyvllm.check_writable("--json", args.json)
    engine_args = EngineArgs(args.model, load_format=args.load_format)
    folder, config = tinyvllm.open_config(engine_args)
    longest = max(prompt + max(new, STEPS + 1) for row in rows.values() for prompt, new in row.requests)
    with tempfile.TemporaryDirectory() as written:
        if args.load_format == "dummy":
            bench.write_config(engine_args, Path(written))
            folder = written
        peer = Peer(folder, args.load_format, longest, config.vocab_size)
        peer.seconds([peer.prompt(128)], [1], {})
        figures = {"start": {"value": seconds_of_life(), "unit": "s"}}
        for name, row in rows.items():
            for _ in range(2):                  # the second counts, as in bench.py
                figures[name] = MEASURES[row.measure](peer, row)
            print(f"{name:<34} {figures[name]['value']:>10,.2f} {figures[name]['unit']}", flush=True)
        if args.json:
            text = json.dumps(peer.facts | {"model": args.model, "rows": figures}, indent=2)
            Path(args.json).write_text(text, "utf-8")
    sys.stdout.flush()
    os._exit(0)                                 # some versions of vLLM do not end by themselves


if __name__ == "__main__":
    tinyvllm.run_program(main)
