#!/usr/bin/env python3
"""tiny-vLLM: an LLM inference engine, small enough to be read from top to bottom.

    python tinyvllm.py "What is a KV cache?"            from tinyvllm import LLM, SamplingParams

    server.py, chat.py,  -->  tokenizer.py  -->  Scheduler       -->  Batch
    tinyvllm.py               text to ids        BlockAllocator       StepBuffer
                              a step for             ^                    |
                              each token             |                    v
    server.py, chat.py,  <--  StreamDecoder <--  sample          <--  Model.forward
    tinyvllm.py               ids to text        the next token       kernels.cu, decode.cu

The life of a request:
  1. tokenizer.py turns a prompt into token ids. The prompt waits in the scheduler as a Sequence.
  2. At every step the scheduler picks the tokens to compute: one token of each answering sequence
     (decode), and pieces of the prompts of new sequences (prefill). A sequence joins when there are
     pages for its keys and values.
  3. The chosen tokens of all sequences form a ragged batch of T tokens. Arrays beside the batch
     give each token's position in its text, and the slot in the paged KV cache for key and value.
  4. The forward pass takes the batch through the model's layers. Attention finds the earlier keys
     and values of a sequence through the sequence's block table.
  5. If a sequence's last token was in the batch, the sampler picks the next token from the logits.
  6. The next token is appended and its text streamed. A finished sequence frees its pages, and the
     next sequence joins.
When the pages run out, the youngest sequence gives its pages back and is computed again later.

Letters for sizes: T tokens and S sequences of a step, R sampled sequences (each gets a token in this
step), P prompt tokens to score, A tiles of attention, L layers, D hidden size, H query heads, K key/value
heads, h head_dim, F ffn size, V vocabulary, N pages of the cache, B tokens of a page (block_size). Weights
and activations are bfloat16. A matrix is stored as [out, in], so a product is x @ w.T.

Sections: Pages, Sequences and scheduler, Forward pass, Memory, Engine, API, Command line.
weights.py reads a model's files, sampling.py holds what a request asks of the sampler, device.py
compiles and starts kernels, on a GPU or in a simulator, fp8.py multiplies matrices in 8 bits (with
--quantization fp8), and program.py is what all programs share: options, signals, exit codes.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import gc
import itertools
import math
import os
import sys
import threading
import time
from array import array as int_array
from collections import Counter, OrderedDict, deque, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# NumPy's idle threads must sleep, not spin: the simulator needs the cores.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
try:
    import numpy as np
    from tqdm import tqdm

    import views
    from communicator import OneRank, start_ranks
    from device import (DECODE_KERNEL, FOLDER, KERNELS, CpuDevice, TinyVLLMError, check, compile_kernels,
                        first_line, open_device, paste, shown)
    from fp8 import Fp8Products, check_fp8_model
    from grammar import Grammars
    from program import (ArgumentParser, EngineArgs, add_sampling_options, as_flags, check_writable,
                         given_sampling, run_program, sampling_params)
    from sampling import ENTRY_INTS, Adjustments, SamplingParams
    from tokenizer import StreamDecoder, Tokenizer, TokenizerError
    from weights import (BYTES, SHAPES, Checkpoint, DummyCheckpoint, ModelConfig, decode_weight_bytes,
                         find_model, generation_defaults, kv_bytes_per_token, load_weights, weight_bytes)
except ModuleNotFoundError as error:
    if Path(sys.argv[0]).resolve().parent != Path(__file__).resolve().parent:   # no program of this folder
        raise
    sys.exit(f"tinyvllm: expected the Python package {error.name}, found none: ./run.sh installs all "
             "packages into .venv, then use .venv/bin/python")

__version__ = "0.1.0"


def is_sequence(value):
    """Whether the value can be a prompt, or a list of prompts."""
    return isinstance(value, (str, list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def cdiv(a, b):
    """a / b, rounded up: the number of pages of b tokens for a tokens."""
    return -(-a // b)


# ==================================================================================================
# Pages
#
# The KV cache keeps each token's key and value in every layer. Later tokens read both instead of
# computing both again. All keys and values live in one pool of N pages (vLLM: blocks) of B tokens
# each. A sequence holds a list of page numbers, its block table. The token at position p has the
# offset p % B within its page and the slot block_table[p // B] * B + p % B within the pool. Pages
# are taken as the text grows and may lie anywhere in the pool. Only the unfilled part of each last
# page is wasted. This section is bookkeeping on the CPU; only kernels touch keys and values.
#
# Prefix caching: a full page never changes, and its content depends only on its own tokens and the
# tokens before. So all sequences with the same beginning (a system prompt, the turns of a chat so
# far) can use the same page. A page counts its users. A page without users keeps its content until
# an allocation needs room; the least recently used page goes first.
#
# A chain is a run of full pages from the beginning of a text. Each distinct chain has a number; 0
# is the empty chain. A dict finds a page: (number of the chain before the page, the page's tokens)
# -> page. Equal keys mean equal texts; a hash of all earlier tokens could collide.
# ==================================================================================================
class BlockAllocator:
    """Hands out pages by number, 0 to num_blocks - 1."""

    def __init__(self, num_blocks, block_size, prefix_caching=True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.free = OrderedDict.fromkeys(range(num_blocks))     # pages without users; the first goes first
        self.ref_counts = [0] * num_blocks
        self.cached = {}                                            # (chain before, tokens) -> [pages]
        self.chains = {}                                            # page -> (its key in cached, its chain)
        self.new_chain = itertools.count(1).__next__

    def allocate(self, count):
        """`count` page numbers. The caller has checked that len(free) >= count."""
        assert count <= len(self.free), f"{count} pages were asked for, {len(self.free)} are free"
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
            if block in self.chains:
                key, _ = self.chains.pop(block)
                self.cached[key].remove(block)
                if not self.cached[key]:
                    del self.cached[key]
        return blocks

    def release(self, blocks):
        """A user gives pages back. A page is useless without the pages before, so the last pages of
        a text are queued for eviction first."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if block not in self.chains:
                    self.free.move_to_end(block, last=False)        # not findable: reuse it first

    def register(self, block, before, tokens):
        """Makes a full page findable. before: the preceding page, or None; tokens: a tuple."""
        chain_before = 0 if before is None else self.chains[before][1]
        key = (chain_before, tokens)
        # At the same time, two sequences may fill a page each with the same tokens. Both pages have
        # the same chain: after the eviction of one, the other and its successors are still found.
        twins = self.cached.setdefault(key, [])
        chain = self.chains[twins[0]][1] if twins else self.new_chain()
        twins.append(block)
        self.chains[block] = (key, chain)

    def find(self, token_ids):
        """The cached pages of the longest known beginning, without the page of the last token: to
        sample the next token, the last token must be computed, since logits are not cached."""
        blocks = []
        chain = 0
        size = self.block_size
        for start in range(0, len(token_ids) - size, size):
            twins = self.cached.get((chain, tuple(token_ids[start:start + size])))
            if twins is None:
                break
            blocks.append(twins[0])
            _, chain = self.chains[twins[0]]
        return blocks

    def next_key(self, blocks, token_ids):
        """The key in `cached` of the page after those that find() returned."""
        chain = self.chains[blocks[-1]][1] if blocks else 0
        start = len(blocks) * self.block_size
        return chain, tuple(token_ids[start:start + self.block_size])

    def share(self, blocks):
        """Adds a user to pages that find() returned."""
        for block in blocks:
            self.ref_counts[block] += 1
            self.free.pop(block, None)

    def check_integrity(self, block_tables):
        """User counts match the block tables, free pages are those without users, and each cached
        page is listed under its own key."""
        users = Counter(block for table in block_tables for block in table)
        pages = range(self.num_blocks)
        assert self.ref_counts == [users[page] for page in pages], f"{self.ref_counts} users, not {users}"
        assert set(self.free) == {page for page in pages if not users[page]}, (
            f"{list(self.free)} are free, but used are {users}")
        assert all(self.chains[page][0] == key for key, twins in self.cached.items() for page in twins)
        assert sum(map(len, self.cached.values())) == len(self.chains)


# ==================================================================================================
# Sequences and scheduler
#
# Continuous batching: each step chooses its tokens anew. The scheduler knows tokens and pages, but
# no arrays, and can be tested without a model.
#   waiting   sequences without pages, in order of arrival. A preempted sequence gives its pages up
#             and returns to the front
#   running   sequences with pages, in order of arrival. Decode adds a page when the last is full
#
# Admission moves the first waiting sequence to running. There must be a place among max_num_seqs,
# budget left in the step (has_room), and enough free pages (admit).
#
# A sequence's tokens are the prompt and the answer so far. The keys and values of the first
# num_computed_tokens tokens are in the cache, or about to be written by a launched step:
#
#   token_ids    [ prompt .................... | answer so far ]
#                [ computed: in the cache ...... | remaining    ]
#
# The next token can be sampled once nothing remains. Before a step, one token remains in decode,
# mostly more in prefill (after arrival or preemption). Nothing else tells decode from prefill.
# ==================================================================================================
@dataclass
class RequestOutput:
    """A request's answer. The output grows with each token, and is final with a finish_reason."""
    prompt_token_ids: list
    text: str = ""
    token_ids: list = field(default_factory=list)
    # "stop": an eos or stop token (the last of token_ids), a stop text, the end of a grammar; "length": a
    # limit; "error"; "abort"
    finish_reason: str | None = None
    error: str | None = None            # why the request was refused
    logprobs: list | None = None        # for each token {token id: log-probability}, of itself and the n best
    prompt_logprobs: list | None = None     # the same for the prompt's tokens; None for the first token
    delta: str = ""                     # the new text since LLM.run or .stream last yielded this output
    num_cached_tokens: int = 0          # tokens of the prompt found in the prefix cache at admission
    num_preemptions: int = 0
    arrival_time: float = 0.0           # seconds of time.perf_counter(), like the next two
    first_token_time: float = 0.0
    finish_time: float = 0.0
    account: dict | None = None         # {part: seconds} of the time in between, from views.Recorder


class Sequence:
    """A request inside the engine: its tokens, its pages, and the progress of the computation."""

    def __init__(self, params, output, decoder, max_len, adjustments=None, matcher=None):
        """max_len: prompt and answer together end at this number of tokens. adjustments: the changed
        logits, None if no logits are changed. matcher: see grammar.py, None without a grammar."""
        self.params = params
        self.output = output
        self.decoder = decoder
        self.max_len = max_len
        self.adjustments = adjustments
        self.matcher = matcher
        # array("i"): four bytes a token. Batch.build joins slices as bytes, without a Python loop.
        self.token_ids = int_array("i", output.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.block_table = int_array("i")
        self.num_registered_blocks = 0      # the first pages, findable by other sequences
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.listeners = []                 # deques of LLM.run that get the output after each new token
        self.was_admitted = False
        self.last_turn = 0                  # see Scheduler.take_turns
        self.blocked_at = -1                # pages to spare when admission failed last (see admit),
        self.missing_key = None             # and the key of the first page that was not found

    @property
    def remaining(self):
        """The number of tokens not yet computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_complete(self):
        """Whether the sequence has all its tokens; the last may be a placeholder (see Engine)."""
        return len(self.token_ids) == self.max_len

    @property
    def awaits_token(self):
        """Whether the next token must wait: a grammar has to see the newest token, a placeholder."""
        return self.matcher is not None and self.token_ids[-1] < 0

    @property
    def num_unscored(self):
        """The number of prompt tokens, after the computed ones, whose log-probabilities are wanted."""
        wants_scores = self.params.prompt_logprobs is not None
        return max(0, self.num_prompt_tokens - 1 - self.num_computed_tokens) if wants_scores else 0

    def restart(self):
        """Goes back to the known tokens, without pages."""
        while self.token_ids[-1] < 0:       # placeholders, see Engine
            self.token_ids.pop()
        if self.adjustments:
            self.adjustments.restart()
        self.num_computed_tokens = 0
        self.block_table = int_array("i")
        self.num_registered_blocks = 0
        self.blocked_at = -1


class Scheduler:
    """Decides on the tokens of the next step, and gives pages to the sequences."""

    def __init__(self, allocator, max_num_batched_tokens, max_num_seqs, chunked_prefill=True,
                 static_batching=False, max_prefill_tokens=0):
        """max_num_batched_tokens: the token budget of a step. max_num_seqs: the limit of running
        sequences. Without chunked_prefill a prompt runs in one step. static_batching: a batch is
        admitted together, and the next batch when all sequences of the first are done.
        max_prefill_tokens: the budget while no sequence decodes, if it is larger than the other."""
        self.allocator = allocator
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens = max(max_prefill_tokens, max_num_batched_tokens)
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.chunked_prefill = chunked_prefill
        self.static_batching = static_batching
        self.waiting = deque()
        self.running = []
        self.turn = 0                       # counts take_turns

    def reset(self):
        """Forgets all sequences and the content of all pages."""
        old = self.allocator
        self.allocator = BlockAllocator(old.num_blocks, old.block_size, old.prefix_caching)
        self.waiting = deque()
        self.running = []

    def schedule(self):
        """[(sequence, number of tokens to compute)]: decodes, then chunks of prompts."""
        decodes = []
        prefills = []
        # 1. Running sequences, oldest first: one token for each decode. The rest of a prompt waits
        #    for 3, and has had pages since admission. A decode without room for its token preempts
        #    the youngest sequence, not yet reached by this loop.
        for sequence in list(self.running):
            if not sequence.block_table:
                break                       # just preempted, and so are all sequences after this one
            if sequence.remaining > 1:
                prefills.append(sequence)
            elif not sequence.is_complete and not sequence.awaits_token and self.grow(sequence):
                decodes.append(sequence)
        # 2. Waiting sequences, in order of arrival.
        room = self.prefill_room(decodes)
        was_idle = not self.running
        while self.waiting and self.has_room(prefills, room, was_idle) and self.admit(prefills):
            prefills.append(self.running[-1])
        # 3. Prompts, as far as their room goes. Decodes take turns in what the prompts leave of the budget.
        chunks = self.divide(prefills, room)
        budget = self.max_num_batched_tokens - sum(chunk for _, chunk in chunks)
        return [(sequence, 1) for sequence in self.take_turns(decodes, budget)] + chunks

    def prefill_room(self, decodes):
        """The prompt tokens of a step: what the decodes leave of the budget, and at least a quarter of
        the budget. Otherwise many decodes could leave a prompt a single token a step.

        While no sequence decodes, a long step delays nobody's next token, and computes a long prompt faster
        than several short steps. The price: a request that arrives now waits for one or two steps (see
        Engine). A prompt of 16,384 tokens takes 0.1 s on an H100 with Llama-3.2-1B, 0.5 s with 3.1-8B."""
        if not decodes and not any(sequence.awaits_token for sequence in self.running):
            return self.max_prefill_tokens
        return max(self.max_num_batched_tokens - len(decodes), self.max_num_batched_tokens // 4)

    def take_turns(self, decodes, budget):
        """As many of the decodes as the budget has room for: those first whose turn was longest ago."""
        if len(decodes) <= budget:
            return decodes
        chosen = sorted(decodes, key=lambda sequence: sequence.last_turn)[:budget]
        for sequence in chosen:
            self.turn += 1
            sequence.last_turn = self.turn
        return chosen

    def divide(self, prefills, room):
        """[(sequence, chunk)]: prompts in order of arrival, until the room is used up. Short prompts
        pass a long one in half of the room; the other half lets the long prompt get on."""
        chunks = []
        passing = []                        # the shortest that fit into half of the room together
        if self.chunked_prefill and prefills and prefills[0].remaining > room:
            short_room = room // 2
            for sequence in sorted(prefills[1:], key=lambda sequence: sequence.remaining):
                if sequence.remaining > short_room:
                    break
                passing.append(sequence)
                short_room -= sequence.remaining
        # Each sequence may have one row of logits, and a prompt's wanted log-probabilities one row for
        # each token: max_num_seqs rows together.
        spare_rows = self.max_num_seqs - len(self.running)
        for sequence in passing + [sequence for sequence in prefills if sequence not in passing]:
            chunk = min(sequence.remaining, room)
            if chunk < sequence.remaining and not self.chunked_prefill:
                break                       # until a step has room for the whole prompt
            if chunk and sequence.num_unscored:
                chunk = min(chunk, 1 + spare_rows)
                spare_rows -= chunk - 1
            if chunk:
                chunks.append((sequence, chunk))
                room -= chunk
        return chunks

    def has_room(self, prefills, room, was_idle):
        """Whether the step of these prompts can take in the first waiting sequence."""
        if self.waiting[0].is_complete or self.waiting[0].awaits_token:
            return False        # preempted with a token in flight, which may be the last
        if len(self.running) >= self.max_num_seqs:
            return False
        if self.static_batching:
            return was_idle
        # Beside prompts too long for this step, divide() lets short prompts have half of the room.
        shorts = [prompt.remaining for prompt in prefills
                  if prompt.remaining <= room or not self.chunked_prefill]
        reserved_for_long = cdiv(room, 2) if len(shorts) < len(prefills) else 0
        return sum(shorts) + reserved_for_long < room

    def admit(self, prefills):
        """Moves the first waiting sequence to running, with pages for all its tokens and the next
        token. Refuses if fewer pages than running sequences would stay free: short of pages, those
        would soon preempt the newcomer, and its prefill would be wasted."""
        sequence = self.waiting[0]
        allocator = self.allocator
        spare = len(allocator.free) - len(self.running)
        # To look up a long prompt takes milliseconds: again only with more pages, or a new page found.
        if spare <= sequence.blocked_at and sequence.missing_key not in allocator.cached:
            return False
        if self.is_worth_waiting(sequence, prefills):
            return False
        # Found pages are not computed again, so their tokens would have no logits.
        cached = [] if sequence.num_unscored else allocator.find(sequence.token_ids)
        num_tokens = len(sequence.token_ids) + 1
        needed = cdiv(num_tokens, allocator.block_size) - len(cached)
        # Found pages without users still count as free, but share() is about to take them.
        if needed > spare - sum(block in allocator.free for block in cached):
            sequence.blocked_at = spare
            sequence.missing_key = allocator.next_key(cached, sequence.token_ids)
            return False
        allocator.share(cached)
        sequence.block_table = int_array("i", cached + allocator.allocate(needed))
        sequence.num_registered_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * allocator.block_size
        sequence.blocked_at = -1
        sequence.last_turn = self.turn
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.output.num_cached_tokens = sequence.num_computed_tokens
        self.running.append(self.waiting.popleft())
        return True

    def is_worth_waiting(self, sequence, prefills):
        """Whether one of these prompts will fill pages with at least half of the tokens that the sequence
        still needs, to be shared then. All behind the sequence wait, too, in order of arrival: not for long,
        since a short prompt is computed in this very step, and a long prompt needs the budget meanwhile."""
        # A static batch is admitted whole. Unscored tokens: see admit.
        if not self.allocator.prefix_caching or self.static_batching or sequence.num_unscored:
            return False
        size = self.allocator.block_size
        tokens = sequence.token_ids
        for other in prefills:
            start = other.num_registered_blocks * size      # pages up to here can be found already
            end = start                     # of the pages with equal tokens; the last token's page stays out
            while end + size < len(tokens) and tokens[end:end + size] == other.token_ids[end:end + size]:
                end += size
            has_half = end > start and 2 * (end - start) >= len(tokens) - start
            if has_half and tokens[:start] == other.token_ids[:start]:      # the longest comparison is last
                return True
        return False

    def grow(self, sequence):
        """Adds a page for the next token if the sequence's pages are full. False if the sequence
        itself is the youngest and was preempted."""
        # A loop, since a preemption may free no page: the victim's pages can have more users.
        while sequence.num_computed_tokens == len(sequence.block_table) * self.allocator.block_size:
            if self.allocator.free:
                sequence.block_table.extend(self.allocator.allocate(1))
            else:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return False
        return True

    def preempt(self, sequence):
        """Takes a sequence's pages, not the tokens. After readmission the keys and values are
        computed again, except in pages still cached."""
        self.remove(sequence)
        sequence.num_computed_tokens = 0
        sequence.output.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def remove(self, sequence):
        """Forgets a running or waiting sequence: a finished, preempted or abandoned request."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self.register_full_blocks(sequence)
        self.allocator.release(sequence.block_table)
        sequence.block_table = int_array("i")
        sequence.num_registered_blocks = 0

    def register_full_blocks(self, sequence):
        """Makes full pages findable. Call this after the launch of the step that fills the pages: a
        sequence that finds a page runs in a later step, so its kernels read after the write."""
        if not self.allocator.prefix_caching:
            return
        size = self.allocator.block_size
        table = sequence.block_table
        for number in range(sequence.num_registered_blocks, sequence.num_computed_tokens // size):
            tokens = tuple(sequence.token_ids[number * size:(number + 1) * size])
            if tokens[-1] < 0:              # a placeholder, see Engine: wait for the token's id
                break
            before = table[number - 1] if number > 0 else None
            self.allocator.register(table[number], before, tokens)
            sequence.num_registered_blocks += 1

    def check_integrity(self):
        """The invariants between two steps."""
        self.allocator.check_integrity([s.block_table for s in self.running])
        assert not any(s.block_table or s.num_computed_tokens for s in self.waiting)
        for s in self.running:
            assert s.num_computed_tokens <= len(s.block_table) * self.allocator.block_size
            assert s.remaining >= 1
            assert s.num_registered_blocks <= s.num_computed_tokens // self.allocator.block_size


# ==================================================================================================
# Forward pass
#
# forward() computes every step: matrix products, and between them kernels. A kernel runs as a grid
# of independent thread blocks, and kernels.NAME(grid, ...) says how many. The GPU deals thread blocks
# to its multiprocessors, a few to each at a time.
#
# A chunk of a prompt and a single token of an answer are treated alike: everything that kernels must
# know of sequences is data, in the Batch:
#
#   sequence 0 brings 5 tokens (a chunk from position 16 on), 1 brings 1 (decode), 2 brings 3:
#   token_ids    a a a a a b c c c       T = 9
#   positions   16 17 18 19 20 41 0 1 2
#   cu_seqlens   0         5 6     9     where each sequence begins ("cu": cumulative)
#   context_lens 21 42 3                 tokens in the cache after this step
#   block_tables 7 2 | 5 3 9 | 4         the pages of each sequence; cu_blocks 0 2 5 6
#
# If every sequence decodes, the step runs as a CUDA graph: the CPU would take longer to start the kernels
# than the GPU to run them. A few batch sizes have a graph each, recorded at the first batch of its size; a
# batch is padded to the next size with unread sequences (vLLM: cudagraph_capture_sizes; enforce_eager: no
# graphs). On an H100 or a newer card, the graphs of up to eight sequences (on several GPUs four of a wide
# model) hold a single kernel for the whole step, decode.cu: the only second path, tested against forward().
#
# All kernels are compiled for the sizes of one model, before the first request.
# ==================================================================================================
GRAPH_SIZES = (1, 2, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
MAX_SPLITS = 32                         # thread blocks for one context; merging reads all results


def cumulative(counts):
    """int32 [n + 1]: 0, then the sums of the first 1, 2, ... n counts."""
    sums = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=sums[1:])
    return sums


@dataclass
class Batch:
    """A step's tokens and everything that the kernels must know about them, in the host's memory. The order
    is that of the upload: numbers of 8 bytes first, for alignment. See StepBuffer for the last three."""
    sampled: list                       # R Sequences, whose last token is in this step
    scored: list                        # (Sequence, position) of P prompt tokens, to report log-probabilities
    slot_mapping: np.ndarray            # [T] int64: the slot for each token's key and value; -1: none
    seeds: np.ndarray                   # [R + P] uint64
    token_ids: np.ndarray               # [T] int32
    positions: np.ndarray               # [T] int32
    cu_seqlens: np.ndarray              # [S + 1] int32
    context_lens: np.ndarray            # [S] int32
    # The rows of logits: R sampled sequences, then P prompt tokens, whose other values ask for nothing.
    last_tokens: np.ndarray             # [R + P] int32: the row's token, an index in the batch
    lengths: np.ndarray                 # [R + P] int32: tokens of each sequence, the new token's position
    temperatures: np.ndarray            # [R + P] float32
    top_ks: np.ndarray                  # [R + P] int32
    top_ps: np.ndarray                  # [R + P] float32
    min_ps: np.ndarray                  # [R + P] float32
    given: np.ndarray                   # [R + P] int32: the token to report; -1: choose one
    newest: np.ndarray                  # [R + P] int32: batch index of the uncounted token (see SPARE), or -1
    cu_entries: np.ndarray              # [R + P + 1] int32: where each row's entries begin
    mask_starts: np.ndarray             # [R + P] int32: where the row's mask begins; -1: no mask
    penalties: np.ndarray               # [R + P, 3] float32: presence, frequency, repetition
    tiles: np.ndarray                   # [2A] int32: the work of attention, see attention_tiles
    cu_blocks: np.ndarray               # [S + 1] int32
    block_tables: np.ndarray            # [pages of all S] int32: sequence s begins at cu_blocks[s]
    # cu_entries and mask_starts count int32s from the beginning of block_tables, whose address a graph knows.
    entries: np.ndarray                 # int32: the rows' changed logits, three numbers each, see sampling.py
    masks: np.ndarray                   # int32: a bit for each token that a grammar allows, see grammar.py

    @classmethod
    def build(cls, scheduled, block_size, group, tile_rows):
        """scheduled: (sequence, number of tokens) pairs. group, tile_rows: see attention_tiles."""
        sequences = [sequence for sequence, _ in scheduled]
        counts = np.array([count for _, count in scheduled], np.int32)                  # [S]
        starts = np.array([s.num_computed_tokens for s in sequences], np.int32)         # [S]
        num_tokens = np.array([len(s.token_ids) for s in sequences], np.int32)          # [S]
        context_lens = starts + counts                                                  # [S]
        cu_seqlens = cumulative(counts)                                                 # [S + 1]

        chunks = [s.token_ids[s.num_computed_tokens:s.num_computed_tokens + count] for s, count in scheduled]
        token_ids = np.frombuffer(b"".join(chunks), np.int32)                           # [T]
        index_in_chunk = np.arange(len(token_ids), dtype=np.int32) - np.repeat(cu_seqlens[:-1], counts)
        positions = np.repeat(starts, counts) + index_in_chunk                          # [T]

        tables = [s.block_table for s in sequences]
        cu_blocks = cumulative([len(table) for table in tables])                        # [S + 1]
        block_tables = np.frombuffer(b"".join(tables), np.int32)
        pages = block_tables[np.repeat(cu_blocks[:-1], counts) + positions // block_size]       # [T]
        slot_mapping = pages.astype(np.int64) * block_size + positions % block_size     # [T]

        chosen = np.flatnonzero(context_lens == num_tokens)     # [R] indices of the sampled sequences
        return cls(
            slot_mapping=slot_mapping,
            token_ids=token_ids,
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_lens=context_lens,
            tiles=attention_tiles(counts, context_lens, group, tile_rows),
            cu_blocks=cu_blocks,
            block_tables=block_tables,
            **cls.build_rows(scheduled, chosen, num_tokens, cu_seqlens, len(block_tables)))

    @staticmethod
    def build_rows(scheduled, chosen, num_tokens, cu_seqlens, num_blocks):
        """The fields of the rows of logits. chosen [R]: the sampled sequences' numbers in scheduled.
        num_tokens [S]: of each sequence. num_blocks: entries of block_tables."""
        sampled = [scheduled[s][0] for s in chosen.tolist()]
        scored = []
        scored_tokens = []                                      # index in the batch of each
        if len(chosen) < len(scheduled) or cu_seqlens[-1] > len(scheduled):     # else all is decode
            for (sequence, count), start in zip(scheduled, cu_seqlens.tolist()):
                for i in range(min(count, sequence.num_unscored)):
                    scored.append((sequence, sequence.num_computed_tokens + i + 1))
                    scored_tokens.append(start + i)
        last_tokens = np.concatenate([cu_seqlens[chosen + 1] - 1, np.array(scored_tokens, np.int32)])
        changes, entries, masks = Batch.build_changes(sampled, last_tokens, num_blocks)
        params = [s.params for s in sampled]
        rows = {
            "seeds": np.array([s.seed for s in sampled], np.uint64),
            "lengths": num_tokens[chosen],
            "temperatures": np.array([p.temperature for p in params], np.float32),
            "top_ks": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
            "top_ps": np.array([p.top_p for p in params], np.float32),
            "min_ps": np.array([p.min_p for p in params], np.float32),
            "given": np.full(len(sampled), -1, np.int32),
            **changes}
        if scored:
            rows = {name: lengthened(name, array, len(scored)) for name, array in rows.items()}
            rows["given"][len(sampled):] = [sequence.token_ids[position] for sequence, position in scored]
        return rows | {"sampled": sampled, "scored": scored, "last_tokens": last_tokens, "entries": entries,
                       "masks": masks}

    @staticmethod
    def build_changes(sampled, last_tokens, num_blocks):
        """(the sampled sequences' fields about changed logits and masks, entries, masks)."""
        entries = []
        num_entries = np.zeros(len(sampled), np.int32)
        masks = []
        mask_lengths = np.zeros(len(sampled), np.int32)
        newest = np.full(len(sampled), -1, np.int32)
        penalties = np.zeros((len(sampled), 3), np.float32)
        for row, sequence in enumerate(sampled):
            if sequence.adjustments:
                ints = sequence.adjustments.up_to(sequence.token_ids, sequence.num_prompt_tokens)
                entries.append(ints)
                num_entries[row] = len(ints)
                penalties[row] = sequence.params.penalties
                if ints and ints[-ENTRY_INTS] < 0:      # without a token: the newest token's, see SPARE
                    newest[row] = last_tokens[row]
            if sequence.matcher:
                masks.append(sequence.matcher.compute_bitmask())
                mask_lengths[row] = len(masks[-1]) // 4
        cu_entries = num_blocks + cumulative(num_entries)
        starts = cu_entries[-1] + cumulative(mask_lengths)[:-1]
        mask_starts = np.where(mask_lengths > 0, starts, -1).astype(np.int32)
        changes = {"newest": newest, "penalties": penalties, "cu_entries": cu_entries,
                   "mask_starts": mask_starts}
        entries = np.frombuffer(b"".join(entries), np.int32)
        masks = np.frombuffer(b"".join(masks), np.int32)
        return changes, entries, masks

    def padded(self, size):
        """A batch of decodes, padded to `size`. The padding writes to no slot and sees no key."""
        count = len(self.token_ids)
        if count == size:
            return self
        numbers = np.arange(size + 1, dtype=np.int32)
        padding = numbers[count:-1]
        new_tiles = np.stack([padding, np.zeros_like(padding)], 1)      # (sequence, first query row 0)
        others = "cu_seqlens", "last_tokens", "tiles", "block_tables", "entries", "masks"
        arrays = {name: lengthened(name, getattr(self, name), size - count)
                  for name in BATCH_ARRAYS if name not in others}
        return replace(
            self, **arrays,
            cu_seqlens=numbers,
            last_tokens=numbers[:-1],
            tiles=np.concatenate([self.tiles, new_tiles.ravel()]))


def lengthened(name, array, count):
    """A Batch's array with `count` more rows, which ask for nothing."""
    value = -1 if name in ("slot_mapping", "given", "newest", "mask_starts") else 0
    if name.startswith("cu_"):
        value = array[-1]
    return np.concatenate([array, np.full((count, *array.shape[1:]), value, array.dtype)])


BATCH_ARRAYS = [f.name for f in fields(Batch) if f.name not in ("sampled", "scored")]
DeviceBatch = namedtuple("DeviceBatch", BATCH_ARRAYS)       # a Batch's arrays in the device's memory


def attention_tiles(counts, context_lens, group, tile_rows):
    """[2A] int32: A tiles, each (sequence, first query row). A tile is the work of one thread block
    of attention for one kv head: at most tile_rows query rows of one sequence. The `group` query
    heads of a kv head share its keys, so each token of the chunk has `group` query rows: row r is
    token r // group, head r % group. counts [S]: tokens of each chunk.
    Tiles with the most keys come first: a long tile, begun last, would run alone at the end."""
    rows = counts * group                                                   # [S] query rows
    num_tiles = cdiv(rows, tile_rows)                                       # [S]
    sequences = np.repeat(np.arange(len(counts)), num_tiles)                # [A]
    first_tiles = np.cumsum(num_tiles) - num_tiles                          # [S]
    tiles_in_sequence = np.arange(len(sequences)) - np.repeat(first_tiles, num_tiles)
    first_rows = tiles_in_sequence * tile_rows                              # [A]
    end_rows = np.minimum(first_rows + tile_rows, rows[sequences])          # [A]
    keys_seen = (context_lens - counts)[sequences] + end_rows // group      # [A] by the last query row
    order = np.argsort(-keys_seen, kind="stable")
    return np.stack([sequences, first_rows], 1)[order].astype(np.int32).ravel()


class StepBuffer:
    """The memory for a step's exchange: the batch goes to the device in one copy, the sampled
    tokens come back in one copy. In a batch of decodes T = S = R, P = 0, and each sequence has one tile.
    The sizes of block_tables, entries and masks alone do not follow from S, so the three come last. A CUDA
    graph finds the arrays up to block_tables at the addresses of its recording, the last two not."""
    # Slot, id, position, and a share of a tile: 8 bytes for 64 query rows or more, which are 4 tokens
    # or more, since a token has 16 query rows at most.
    TOKEN_BYTES = 8 + 4 + 4 + 2
    # Three arrays of 4 bytes, a last, partial tile; of a row of logits a seed, ten arrays, three penalties.
    SEQUENCE_BYTES = 3 * 4 + 8 + 8 + 13 * 4

    def __init__(self, device, max_tokens, max_seqs, max_blocks):
        """max_seqs: of sequences and of rows of logits, each. max_blocks: entries of all block tables.
        Shared pages make more entries than pages."""
        self.device = device
        # Of the latest step: [0] token ids, [1] log-probabilities, float32 seen as int32.
        self.sampled = device.xp.zeros((2, max_seqs), np.int32)
        self.sources = []
        # max_seqs + 1: three arrays have an entry more than sequences or rows.
        self.allocate(self.TOKEN_BYTES * max_tokens + self.SEQUENCE_BYTES * (max_seqs + 1) + 4 * max_blocks)

    def allocate(self, num_bytes):
        """Makes room for batches of so many bytes, in place of the present room."""
        for _, wait in self.sources:
            wait()
        self.target = self.device.empty(num_bytes, np.uint8)
        # Two sources, used in turn: the copy of the previous step may still read the other source.
        # Each with wait(), until its last copy is done.
        self.sources = [(self.device.pinned(num_bytes), lambda: None) for _ in range(2)]

    def upload(self, batch):
        source, wait = self.sources[1]
        wait()              # only after an interrupted step is there anything to wait for
        arrays = b"".join(getattr(batch, name) for name in BATCH_ARRAYS)
        source[:len(arrays)] = np.frombuffer(arrays, np.uint8)
        wait = self.device.copy(self.target[:len(arrays)], source[:len(arrays)])
        self.sources = [(source, wait), self.sources[0]]

    def device_batch(self, batch):
        """The DeviceBatch of an uploaded Batch. A graph needs none: its kernels know the addresses."""
        arrays = {}
        end = 0
        for name in BATCH_ARRAYS:
            array = getattr(batch, name)
            start = end
            end += array.nbytes
            arrays[name] = self.target[start:end].view(array.dtype).reshape(array.shape)
        return DeviceBatch(**arrays)


def rope_frequencies(config):
    """Radians per position for the rotation of each of a head's pairs (i, i + h/2), float64 [h/2].
    RoPE (arXiv:2104.09864): pair i turns by theta^(-2i/h). Llama 3.1 (arXiv:2407.21783) stretched
    the context: pairs with less than low_freq_factor turns in the original context are slowed by
    `factor`, pairs with more than high_freq_factor turns are unchanged, with a blend in between."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def compile_model(config, device, args, communicator):
    """The kernels, with the sizes of a model (of a rank) as constants."""
    c = config
    has_decode_kernel = all(communicator.exchange(args.fused_decode and device.runs_decode))
    code = paste(KERNELS, DECODE_KERNEL) if has_decode_kernel else paste(KERNELS)
    return compile_kernels(device, {
        "HIDDEN": c.hidden_size, "FFN": c.intermediate_size, "NUM_LAYERS": c.num_hidden_layers,
        "NUM_HEADS": c.num_attention_heads, "NUM_KV_HEADS": c.num_key_value_heads, "HEAD_DIM": c.head_dim,
        "VOCAB": c.vocab_size, "BLOCK_SIZE": args.block_size, "RMS_EPS": f"{c.rms_norm_eps:e}f",
        "QKV_BIAS": int(c.attention_bias), "O_BIAS": int(c.attention_out_bias),
        "QK_NORM": int(c.qk_norm), "FP8_WEIGHTS": int(c.quantization == "fp8"),
        "FP8_CACHE": int(c.kv_cache_dtype == "fp8"), "RANKS": c.num_ranks}, code)


class Products:
    """The products with a layer's matrices, and what follows them. Fp8Products, in fp8.py, takes the place of
    this class for matrices in 8 bits: the next product's input, x, is then not the residual stream itself."""

    def __init__(self, device, kernels, communicator):
        self.device = device
        self.kernels = kernels
        self.communicator = communicator
        self.linear = device.linear

    def first_input(self, residual):
        """The input of the first layer's qkv."""
        return residual

    def row_scales(self, w):
        """The numbers by which the columns of a product with w must still be multiplied, if any."""
        return None

    def empty_activation(self, tokens, columns):
        """The array that silu_mul() fills."""
        return self.device.empty((tokens, columns))

    def silu_mul(self, activation, gate_up, residual, w):
        """Fills the input of down [T, F]. gate_up: the product with w; silu_mul applies the norm's factor."""
        tokens, columns = activation.shape
        grid = (cdiv(columns, self.kernels.SILU_COLUMNS), tokens)
        self.kernels.silu_mul(grid, activation, gate_up, residual, None, None, None)

    def add(self, residual, x, w, bias=None):
        """(residual + x @ w.T + bias [D, 1], the input of the next product). Several ranks have parts of x
        and w, so the sum of their products is taken; rank 0 alone adds its product to the residual."""
        is_first = self.communicator.rank == 0
        product = self.linear(x, w, add_to=residual if is_first else None)
        residual = self.communicator.all_reduce(product)
        if bias is not None:                        # for all tokens: a product with ones [T, 1]
            self.linear(self.device.xp.ones((len(x), 1), residual.dtype), bias, add_to=residual)
        return residual, residual

    def logits(self, x, head):
        """x @ head.T, for normed tokens."""
        return self.linear(x, head)


class Model:
    """Config, weights, kernels and the KV cache, on a device."""

    def __init__(self, config, weights, device, num_blocks, max_model_len, buffer, args,
                 communicator=None, kernels=None):
        """num_blocks: pages of the KV cache. max_model_len: number of possible positions. buffer: a
        StepBuffer. args: block_size, enforce_eager and fused_decode of EngineArgs. communicator: where
        several ranks share the model; config and weights are then a rank's. kernels: compile_model's, if
        the loading has needed them. Otherwise a faulty checkpoint is refused before kernels are compiled."""
        c = config
        self.config = config
        self.weights = weights
        self.device = device
        self.buffer = buffer
        self.communicator = communicator or OneRank()
        self.graphs = {}                    # size -> replay(), see device.record
        # 1 / sqrt(h), times log2(e): the kernels' softmax takes powers of 2.
        self.query_scale = math.log2(math.e) / math.sqrt(c.head_dim)
        self.kernels = kernels or compile_model(c, device, args, self.communicator)
        kind = Fp8Products if c.quantization else Products
        self.products = kind(device, self.kernels, self.communicator)
        # group and tile_rows of attention_tiles
        self.tiling = c.num_attention_heads // c.num_key_value_heads, self.kernels.ATTENTION_ROWS
        # The greatest batch for decode(). decode.cu says 0 for a model that it cannot divide.
        self.decode_batch = getattr(self.kernels, "DECODE_BATCH", 0)
        matrices = [matrix for layer in weights.layers      # in the order of the forward pass
                    for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]
        scales = []
        if c.quantization:
            matrices, scales = zip(*matrices)
        self.addresses = self.addresses_of(matrices)                                    # [4L + 1]
        self.scale_addresses = self.addresses_of(scales)                                # [4L + 1] or []
        self.biases = None                                                              # [L, (H + 2K) h]
        if c.attention_bias:
            self.biases = device.xp.stack([layer.qkv_bias for layer in weights.layers])
        # Keys are kv_cache[l, 0], values kv_cache[l, 1] of layer l. Within a page each head's
        # tokens are consecutive.
        self.kv_cache = device.empty(
            (c.num_hidden_layers, 2, num_blocks, c.num_key_value_heads, args.block_size, c.head_dim),
            c.kv_dtype)
        angles = np.arange(max_model_len)[:, None] * rope_frequencies(c)                # [max_model_len, h/2]
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], 1, dtype=np.float32)
        self.cos_sin = device.to_device(cos_sin)                                        # [max_model_len, h]
        num_words = self.kernels.DECODE_SHARED_WORDS if self.decode_batch else 0
        self.communicator.connect(device, self.kernels, num_words)
        is_eager = args.enforce_eager or not self.communicator.fits_graphs
        self.graph_sizes = () if is_eager else GRAPH_SIZES

    def addresses_of(self, arrays):
        """The arrays' addresses, on the device, for decode.cu."""
        return self.device.to_device(np.array([self.device.address(array) for array in arrays], np.uint64))

    def graph_size(self, batch):
        """The size of the CUDA graph for this batch. None: the batch runs without a graph."""
        num_tokens = len(batch.token_ids)
        if not num_tokens == len(batch.context_lens) == len(batch.sampled):     # T = S = R: all is decode
            return None
        return next((size for size in self.graph_sizes if size >= num_tokens), None)

    def launch(self, batch):
        """Starts a step in all ranks and does not wait. Returns the logits [R + P, V], valid until the next
        step, and get_tokens(), a function that waits and returns the rows' tokens, int32 [R + P], and their
        log-probabilities, float32 [R + P]. All three can have more rows, which mean nothing."""
        size = self.graph_size(batch)
        batch = batch if size is None else batch.padded(size)
        with self.communicator.announce(size, [getattr(batch, name) for name in BATCH_ARRAYS]):
            logits = self.execute(batch, size)
        return logits, self.fetch_pair(self.buffer.sampled)

    def execute(self, batch, size):
        """Starts a step in one rank. size: of the CUDA graph, or None. Returns the logits."""
        num_bytes = sum(getattr(batch, name).nbytes for name in BATCH_ARRAYS)
        if num_bytes > len(self.buffer.target):             # changed logits and masks have no limit
            self.buffer.allocate(2 * num_bytes)
            self.graphs.clear()                             # recorded with the old addresses
        self.buffer.upload(batch)
        if size is None:
            logits = self.forward(self.buffer.device_batch(batch))
        elif size in self.graphs:
            logits = self.graphs[size]()                        # reads what upload() has just written
        else:
            b = self.buffer.device_batch(batch)
            run = self.decode if size <= self.decode_batch else self.forward
            logits, self.graphs[size] = self.device.record(lambda: run(b))
        self.communicator.keep(self.buffer.sampled[0])
        return logits

    def fetch_pair(self, pair):
        """Starts a copy of token ids and log-probabilities (float32, seen as int32) to the host.
        Returns wait(), which waits and returns both."""
        wait_for_both = self.device.fetch(pair)

        def wait():
            tokens, logprobs = wait_for_both()
            self.communicator.check()
            return tokens, logprobs.view(np.float32)
        return wait

    def best_logprobs(self, logits, count):
        """Starts to choose the `count` most probable tokens of each row of logits [R, V]. Returns
        wait(), which waits and returns token ids, best first, and log-probabilities, [R, count] each."""
        count = min(count, self.config.vocab_size)
        best = self.device.empty((2, len(logits), count), np.int32)
        tokens, logprobs = best
        self.kernels.best_logprobs((len(logits),), tokens, logprobs.view(np.float32), logits, count)
        return self.fetch_pair(best)

    def forward(self, b):
        """Puts the new tokens' keys and values into the cache, and the sampled sequences' next
        tokens into the step buffer. Returns the logits [R + P, V]. b: a DeviceBatch."""
        c, w, kernels, products = self.config, self.weights, self.kernels, self.products
        T, num_rows, num_tiles = len(b.token_ids), len(b.last_tokens), len(b.tiles) // 2
        D, F, H, K, h = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                         c.head_dim)
        # To keep the memory busy, attention needs two thread blocks for each multiprocessor. A
        # small batch has fewer, one per tile and kv head, so each context is split. The number of
        # splits must not depend on the contexts: a CUDA graph repeats its recording's grid.
        splits = max(1, min(MAX_SPLITS, 2 * self.device.multiprocessors // (num_tiles * K)))
        partial = self.device.empty((T, H, splits, h + 2), np.float32) if splits > 1 else None
        # Same results, but single queries need fewer registers: more thread blocks run at once.
        attend = kernels.decode_attention if T == len(b.context_lens) else kernels.paged_attention
        residual = self.device.empty((T, D))
        attention = self.device.empty((T, H * h))
        activation = products.empty_activation(T, F)

        # The embedding. A token id ~row stands for the id sampled[0][row] of the previous step.
        kernels.gather_rows((T,), residual, w.embed, b.token_ids, self.buffer.sampled[0])
        x = products.first_input(residual)
        for layer, (k_cache, v_cache) in zip(w.layers, self.kv_cache):
            # residual += attention(norm(residual)) @ o. rope_and_cache applies the norm's factor.
            qkv = products.linear(x, layer.qkv)                                         # [T, (H + 2K) h]
            kernels.rope_and_cache((T,), qkv, residual, self.cos_sin, b.positions, b.slot_mapping, k_cache,
                                   v_cache, self.query_scale, layer.qkv_bias, layer.qk_norm,
                                   products.row_scales(layer.qkv))
            attend((K * splits, num_tiles), attention, qkv, k_cache, v_cache, b.block_tables, b.cu_blocks,
                   b.cu_seqlens, b.context_lens, b.tiles, partial)
            residual, x = products.add(residual, attention, layer.o, layer.o_bias)

            # residual += (silu(norm(residual) @ gate) * (norm(residual) @ up)) @ down. silu_mul
            # applies the norm's factor.
            gate_up = products.linear(x, layer.gate_up)                                 # [T, 2F]
            products.silu_mul(activation, gate_up, residual, layer.gate_up)
            residual, x = products.add(residual, activation, layer.down)

        if num_rows == 0:
            return None
        x = self.device.empty((num_rows, D))                # not of all tokens: the head is large
        kernels.rms_norm((num_rows,), x, residual, b.last_tokens, w.norm)
        logits = self.communicator.all_gather(products.logits(x, w.head))
        return self.sample(logits, b)

    def decode(self, b):
        """forward() for a few sequences with one token each, in one kernel (decode.cu)."""
        c, w, kernels = self.config, self.weights, self.kernels
        S = len(b.token_ids)
        splits = kernels.DECODE_SPLITS // S                 # of a context, at most
        # Through these words, 0 at first, thread blocks exchange results: see Vectors in decode.cu. Of
        # several ranks, each has words that the others can write.
        words_per_layer = S * (kernels.DECODE_VECTOR_WORDS + splits * kernels.DECODE_PARTIAL_WORDS)
        num_words = kernels.DECODE_TICKET_WORDS + (c.num_hidden_layers + 1) * words_per_layer
        words = self.device.xp.zeros(num_words, np.int32) if c.num_ranks == 1 else None
        logits = self.device.empty((S, c.vocab_size // c.num_ranks))
        num_blocks = self.kv_cache.shape[2]
        kernels.decode((self.device.multiprocessors,), logits, w.embed, w.norm, b.token_ids,
                       self.buffer.sampled[0], self.addresses, c.num_hidden_layers, self.cos_sin,
                       b.positions, b.slot_mapping, self.kv_cache, num_blocks, b.block_tables, b.cu_blocks,
                       b.context_lens, self.query_scale, words, S, splits, self.biases, self.scale_addresses,
                       self.communicator.word_addresses, self.communicator.rank)
        return self.sample(self.communicator.all_gather(logits), b)

    def sample(self, logits, b):
        """Puts the next tokens into the step buffer and returns the logits. The noise of a draw
        depends only on the request's seed and the token's position."""
        tokens, logprobs = self.buffer.sampled
        self.kernels.sample((len(logits),), tokens, logprobs.view(np.float32), logits, b.temperatures,
                            b.top_ks, b.top_ps, b.min_ps, b.seeds, b.lengths, b.given, b.penalties,
                            b.block_tables, b.cu_entries, b.newest, b.token_ids, b.mask_starts)
        return logits


# ==================================================================================================
# Memory
#
# The card's memory holds the weights, the arrays of a step, and, in the rest of the engine's share,
# the KV cache. weights.py counts the bytes of weights, and of a token in the cache.
# ==================================================================================================
CUBLAS_AND_CODE_BYTES = 2**28           # cuBLAS's workspace, and the kernels


def token_bytes(config):
    """Bytes of a step's arrays for a token. Twice: CuPy's pool may still hold the previous step's."""
    c = config
    copies = 1 if c.num_ranks == 1 and not c.quantization else 2    # a product beside the residual
    per_token = copies * c.hidden_size + c.qkv_size + c.heads_size + 3 * c.intermediate_size
    return 2 * BYTES * per_token


def step_bytes(config, args, max_model_len):
    """Bytes of all arrays of a step. Long steps have pages' memory, see plan_pool."""
    c = config
    # The graphs share arrays, so the largest graph counts.
    tokens = args.token_budget + GRAPH_SIZES[-1]
    # Logits: twice the largest step's, and one array for each graph.
    graph_rows = sum(size for size in GRAPH_SIZES if size < 2 * args.max_num_seqs)
    rows = 2 * args.max_num_seqs + graph_rows
    angles = 4 * c.head_dim * max_model_len
    copies = 1 if c.num_ranks == 1 else 2                   # several ranks: all logits, and these in order
    logits = BYTES * rows * (copies * c.vocab_size + c.hidden_size)
    return tokens * token_bytes(config) + logits + angles + CUBLAS_AND_CODE_BYTES


def kv_cache_blocks(config, memory, args):
    """The number of pages that fit into memory, (free, total) bytes; the engine may use the share
    args.gpu_memory_utilization of the total."""
    free, total = memory
    weights = weight_bytes(config)
    arrays = step_bytes(config, args, args.max_model_len or config.max_position_embeddings)
    usable = free - (1 - args.gpu_memory_utilization) * total
    left = usable - weights - arrays
    context = args.max_model_len or args.block_size         # tokens that must fit
    page_bytes = args.block_size * kv_bytes_per_token(config)
    needed = cdiv(context, args.block_size) * page_bytes
    if left < needed:
        raise TinyVLLMError(
            f"too little memory: expected {(weights + arrays + needed) / 1e9:.3f} GB ({weights / 1e9:.3f} "
            f"for the weights, {arrays / 1e9:.3f} for a step, {needed / 1e9:.3f} for a context of {context} "
            f"tokens), got {max(usable, 0) / 1e9:.3f} GB: raise gpu_memory_utilization, lower max_model_len, "
            "or take a smaller model")
    return int(left // page_bytes)


# num_blocks: pages of the KV cache (every rank can hold as many). max_prefill_tokens: the token budget while
# no sequence decodes. max_model_len: the limit of prompt and answer. advice: how to raise the limit.
Plan = namedtuple("Plan", "num_blocks max_prefill_tokens max_model_len advice")


def plan_pool(config, device, args, communicator):
    """The Plan of a model. A sequence that fits the pool alone (and, without chunked prefill, a step) can
    always finish, if the rest is preempted: max_model_len is the only limit for requests."""
    limit = args.max_model_len or config.max_position_embeddings
    check("max_model_len", limit, lambda n: n <= config.max_position_embeddings,
          f"at most the model's {config.max_position_embeddings}")
    # Attention over all keys is attention over a window of so many.
    window = config.sliding_window or limit
    check("max_model_len", limit, lambda n: n <= window,
          f"at most the model's sliding_window, {window} (pass max_model_len={window})")
    if not args.enable_chunked_prefill:
        check("max_model_len", args.max_model_len or 1, lambda n: n <= args.token_budget,
              f"at most max_num_batched_tokens, {args.token_budget}, without chunked prefill")
    fitting = min(communicator.exchange(kv_cache_blocks(config, device.memory(), args)))
    pages = cdiv(limit, args.block_size)
    # Long steps get the memory of an eighth of the pages at most, if a context fits into the others.
    tokens_per_block = args.block_size * kv_bytes_per_token(config) / token_bytes(config)
    long_step_blocks = math.ceil((args.prefill_budget - args.token_budget) / tokens_per_block)
    beside = max(fitting - min(long_step_blocks, fitting // 8), min(fitting, pages))
    num_blocks = args.num_blocks or min(beside, args.max_num_seqs * pages)      # enough for all at once
    if num_blocks > fitting:
        raise TinyVLLMError(f"num_blocks: expected at most {fitting}, which memory holds, got {num_blocks}")
    if args.max_model_len and num_blocks < pages:
        raise TinyVLLMError(f"num_blocks: expected {pages} or more, to hold max_model_len, got {num_blocks}")
    fitting_tokens = args.token_budget + int((fitting - num_blocks) * tokens_per_block)
    max_prefill_tokens = min(args.prefill_budget, fitting_tokens)
    pool = "num_blocks" if args.num_blocks else "gpu_memory_utilization"
    whole_prompts = math.inf if args.enable_chunked_prefill else args.token_budget
    limits = {"": config.max_position_embeddings, "max_model_len": limit, pool: num_blocks * args.block_size,
              "max_num_batched_tokens, or leave --no-chunked-prefill out": whole_prompts}
    option = min(limits, key=limits.get)                # the narrowest
    advice = f"the model's limit is {config.max_position_embeddings}"
    if option:
        advice = f"raise {option}; {advice}"
    if limits[option] < limit and communicator.rank == 0:
        print(f"tiny-vLLM: prompt and answer can have {limits[option]} tokens together: {advice}",
              file=sys.stderr)
    return Plan(num_blocks, max_prefill_tokens, limits[option], advice)


# ==================================================================================================
# Engine
#
# A model, a scheduler, and the loop between the two. All work of a server happens in step().
#
# The GPU takes a millisecond or more for a step. Python takes half a millisecond to plan the next step
# and to hand out tokens. The GPU shall not wait so long, so step n + 1 is launched before the tokens of
# step n are read (vLLM: async scheduling):
#
#   CPU   launch 1  launch 2  wait .......... read 1  launch 3  wait ..... read 2  launch 4
#   GPU             | step 1 ............... | step 2 .................... | step 3 ........
#
# To plan step n + 1 the CPU needs the number of step n's new tokens, not the ids. Until an id is known,
# the sequence holds a placeholder: ~row, a negative number. The row is the sequence's index among the
# sampled sequences of step n. On the GPU, gather_rows (or decode.cu) reads the id from sampled[0][row].
# When a step is planned, a sequence's newest token alone can be a placeholder, from the step just
# launched. The last two can be placeholders between a launch and the reading of the step before.
#
# The CPU notices the end of an answer one step late. Step n + 1 then computes a token too many, and
# finish() drops the token. Its key and value may go to a page that another sequence has got by
# then. No harm is done: that sequence's step stands behind this one in the GPU's queue.
#
# A step can be interrupted between any two statements: by Ctrl-C, or by an error of the device (so it is
# not enough to hold signals back). All state is then in doubt, but for the requests and the known tokens
# of each answer. Both change by one call that happens whole or not at all. The next step derives all
# other state from both anew (rebuild), and computes the keys and values again.
# ==================================================================================================
@dataclass
class Stats:
    """Bytes and seconds of all decode steps so far (every sequence brings one token). Memory limits
    such a step, so compare bytes over seconds with the card's bandwidth."""
    decode_bytes: int = 0               # weights once a step, keys and values of every sequence's context
    decode_seconds: float = 0.0
    last_time: float = 0.0              # when the tokens of the latest step were read

    def add(self, batch, start, config):
        """Counts a step just read. Its time begins with its launch or with the reading of the
        previous step, whichever is later, and includes Python and the recording of CUDA graphs. A
        short run therefore shows less than the card can do."""
        now = time.perf_counter()
        if len(batch.token_ids) == len(batch.context_lens):
            context_bytes = kv_bytes_per_token(config) * int(batch.context_lens.sum())
            self.decode_bytes += decode_weight_bytes(config) + context_bytes
            self.decode_seconds += now - max(start, self.last_time)
        self.last_time = now


# A step with unread tokens. get_best: see Model.best_logprobs, None if no sequence wants them;
# get_tokens: see Model.launch; start: the time of the launch.
Flight = namedtuple("Flight", "batch get_best get_tokens start")


class Engine:
    """Runs requests by continuous batching."""

    def __init__(self, model, scheduler, overlap):
        """overlap: start a step before reading the previous one: the GPU never waits for Python."""
        self.model = model
        self.scheduler = scheduler
        self.overlap = overlap
        self.stats = Stats()
        self.sequences = {}                 # id(output) -> Sequence of all unfinished requests, by arrival
        self.in_flight = deque()            # of Flights, oldest first
        self.aborted = deque()              # outputs of abandoned requests, until a step drops them
        self.observers = []                 # objects with told(event, what), such as views.Recorder
        self.lock = threading.RLock()       # held in a step; R: an interrupt may prevent the release
        self.is_torn = False                # if True when a step begins: the last was cut off

    def tell(self, event, what=None):
        """Tells the observers of a beginning or an end. The run goes on without a failing observer."""
        for observer in list(self.observers):
            try:
                observer.told(event, what)
            except Exception as error:
                self.observers.remove(observer)
                print(f"tiny-vLLM: {type(observer).__name__} is off: {error!r:.200}", file=sys.stderr)

    def add(self, sequences):
        """Queues new sequences, all or none."""
        with self.lock:
            was_torn = self.is_torn         # a step torn before stays torn
            self.is_torn = True
            self.sequences.update({id(sequence.output): sequence for sequence in sequences})
            self.scheduler.waiting.extend(sequences)
            self.is_torn = was_torn

    def step(self):
        """Starts a step and returns the sequences with a new token: from this step or, with
        overlap, from the previous step. Call step() while there is work."""
        with self.lock:
            if self.is_torn:
                self.rebuild()
            self.is_torn = True
            self.drop_aborted()
            self.tell("schedule")
            scheduled = self.scheduler.schedule()
            if scheduled:
                self.launch(scheduled)
            num_unread = 1 if self.overlap and scheduled else 0
            got_token = []
            while len(self.in_flight) > num_unread:
                got_token += self.finish()
            self.is_torn = False
        return got_token

    def rebuild(self):
        """Derives all state anew from the requests and their known tokens. A rebuild may itself be
        interrupted: the next rebuild starts from the same facts."""
        self.in_flight.clear()
        self.scheduler.reset()
        for sequence in list(self.sequences.values()):
            output = sequence.output
            if output.finish_reason is None:
                sequence.restart()
                self.scheduler.waiting.append(sequence)
                self.read_again(sequence)
            else:                           # final, but not yet taken out
                self.forget(sequence)
        self.tell("rebuilt")

    def read_again(self, sequence):
        """Derives an output, and whether the answer ends, from the sequence's own tokens."""
        output = sequence.output
        answer = sequence.token_ids[sequence.num_prompt_tokens:].tolist()
        sequence.decoder.reset()
        if sequence.matcher:
            sequence.matcher.reset()
        text = ""
        reason = None
        for position, token in enumerate(answer, sequence.num_prompt_tokens):
            piece, reason = self.read_token(sequence, position, token)
            text += piece
        output.token_ids[:] = answer
        output.text = text
        if output.logprobs is not None:
            del output.logprobs[len(answer):]
        if reason:
            self.end(sequence, reason)
        else:
            self.notify(sequence)

    def drop_aborted(self):
        """Ends abandoned requests. abort() may come at any moment, also from the garbage collector
        in the middle of a step, so it only leaves a note in self.aborted."""
        while self.aborted:
            sequence = self.sequences.get(id(self.aborted[0]))
            if sequence:
                self.end(sequence, "abort")
            self.aborted.popleft()          # last: the note is not lost if this loop is interrupted

    def launch(self, scheduled):
        """Starts a step and books its tokens: the number is enough to plan the next step."""
        start = time.perf_counter()
        self.tell("launch", scheduled)
        model = self.model
        batch = Batch.build(scheduled, self.scheduler.allocator.block_size, *model.tiling)
        logits, get_tokens = model.launch(batch)
        # Now, since the next step overwrites the logits.
        counts = [sequence.params.logprobs or 0 for sequence in batch.sampled]
        counts += [sequence.params.prompt_logprobs for sequence, _ in batch.scored]
        count = max(counts, default=0)
        get_best = model.best_logprobs(logits, count) if count else None
        self.in_flight.append(Flight(batch, get_best, get_tokens, start))
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
            self.scheduler.register_full_blocks(sequence)
        for row, sequence in enumerate(batch.sampled):
            sequence.token_ids.append(~row)                     # a placeholder
        self.tell("launched")

    def finish(self):
        """Waits for the oldest step in flight, hands out the tokens and returns the sequences. A
        sequence that has ended or was given up in the meantime gets no token."""
        batch, get_best, get_tokens, start = self.in_flight[0]
        self.tell("wait")
        tokens, logprobs = (array.tolist() for array in get_tokens())
        best_tokens, best_logprobs = get_best() if get_best else (None, None)
        self.tell("read")
        got_token = []

        def report(row, count):
            """{token id: log-probability} of a row's token and of the `count` best."""
            best = {}
            if count:
                best = dict(zip(best_tokens[row, :count].tolist(), best_logprobs[row, :count].tolist()))
            return best | {tokens[row]: logprobs[row]}          # the row's token need not be among the best
        for row, (sequence, position) in enumerate(batch.scored, len(batch.sampled)):
            if not sequence.output.finish_reason:
                sequence.output.prompt_logprobs[position] = report(row, sequence.params.prompt_logprobs)
        positions = batch.lengths.tolist()
        for row, (sequence, position) in enumerate(zip(batch.sampled, positions)):
            if sequence.output.finish_reason:
                continue
            if math.isnan(logprobs[row]):
                self.end(sequence, "error", "the model's logits are NaN or infinite: check the weights")
                continue
            if sequence.matcher and not sequence.matcher.validate_tokens([tokens[row]]):
                reason = sequence.matcher.get_error() or "no token that the grammar allows is possible"
                self.end(sequence, "error", f"structured output: {first_line(reason)}")
                continue
            if sequence.output.logprobs is not None:
                sequence.output.logprobs.append(report(row, sequence.params.logprobs))
            self.append(sequence, position, tokens[row])
            got_token.append(sequence)
        self.in_flight.popleft()
        self.stats.add(batch, start, self.model.config)
        self.tell("done", got_token)
        return got_token

    def append(self, sequence, position, token):
        """Gives a sequence its new token: adds the text, and ends a complete answer."""
        output = sequence.output
        sequence.token_ids[position] = token        # from here on, the token is known
        output.token_ids.append(token)
        output.first_token_time = output.first_token_time or time.perf_counter()
        text, reason = self.read_token(sequence, position, token)
        output.text += text
        if reason:
            self.end(sequence, reason)
        else:
            self.notify(sequence)

    def read_token(self, sequence, position, token):
        """(a token's text, why the answer ends or None). position: the token's, in the sequence."""
        params = sequence.params
        is_eos = token in self.model.config.eos_token_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            return "", "stop"               # the token's own text is not in the answer
        num_tokens = position + 1 - sequence.num_prompt_tokens
        text = sequence.decoder.push(token, num_tokens > params.min_tokens)
        if sequence.decoder.has_stopped:
            return text, "stop"
        if sequence.matcher and sequence.matcher.consume_token(token) and sequence.matcher.is_stopped():
            return text, "stop"
        return text, "length" if position + 1 == sequence.max_len else None

    def end(self, sequence, reason, error=None):
        """Makes the output of a running or waiting sequence final."""
        output = sequence.output
        output.text += sequence.decoder.flush()
        output.error = error
        output.finish_time = time.perf_counter()
        output.finish_reason = reason
        self.scheduler.remove(sequence)
        self.forget(sequence)

    def forget(self, sequence):
        """Takes out a sequence whose output is final."""
        self.notify(sequence)
        self.tell("ended", sequence)
        self.sequences.pop(id(sequence.output), None)       # last: rebuild() repeats an interrupted end

    def listen(self, output, news):
        """Appends the output to a deque now, after each new token, and at its end."""
        sequence = self.sequences.get(id(output))
        if sequence:
            sequence.listeners.append(news)
        elif output.finish_reason is None:
            raise TinyVLLMError("run: expected outputs of this LLM's submit(), got another's")
        news.append(output)

    def notify(self, sequence):
        """Tells the callers in LLM.run of an output's new token or end."""
        for listener in sequence.listeners:
            listener.append(sequence.output)


# ==================================================================================================
# API
#
# The calls for programs, named as in vLLM. There is no thread: callers step the engine for tokens.
# Each step serves the requests of all callers (two streams, say), who find their tokens later.
# Callers in several threads take turns at steps. An abandoned request frees its pages with the next
# step. An unanswerable prompt is refused before it takes a page, as an output with an error; the
# rest of its list runs.
# ==================================================================================================
def open_config(args):
    """(folder, ModelConfig). A shape by name has Parrot's folder: any tokenizer will do."""
    name = args.model or os.environ.get("TINYVLLM_MODEL")
    if args.load_format == "dummy" and name in SHAPES:
        folder, config = FOLDER / "parrot", SHAPES[name]
    else:
        folder = find_model(name, args.load_format)
        config = ModelConfig.from_folder(folder)
    quantization = args.quantization or config.quantization
    return folder, replace(config, quantization=quantization, kv_cache_dtype=args.kv_cache_dtype)


def load_model(folder, config, device, args, communicator):
    """(Model, Plan), in each rank. config: a rank's."""
    plan = plan_pool(config, device, args, communicator)
    checkpoint = DummyCheckpoint(device) if args.load_format == "dummy" else Checkpoint(folder)
    kernels = compile_model(config, device, args, communicator) if config.quantization else None
    weights = load_weights(checkpoint, config, device, communicator.rank, kernels)
    max_tokens = max(plan.max_prefill_tokens, *GRAPH_SIZES)
    max_seqs = max(args.max_num_seqs, *GRAPH_SIZES)
    max_blocks = args.max_num_seqs * cdiv(plan.max_model_len, args.block_size)
    buffer = StepBuffer(device, max_tokens, max_seqs, max_blocks)
    model = Model(config, weights, device, plan.num_blocks, plan.max_model_len, buffer, args, communicator,
                  kernels)
    return model, plan


# Starts the process of another rank than 0, see communicator.py.
RANK_COMMAND = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import tinyvllm; "
                                      "from communicator import follow; follow(tinyvllm.run_rank)"]


def run_rank(communicator):
    """The whole work of a rank other than 0: it launches the steps that rank 0 sends."""
    folder, config, args, first_gpu = communicator.exchange(None)[0]
    CpuDevice.has_warned = True         # by rank 0
    device = open_device(args.device, first_gpu + communicator.rank)
    model, _ = load_model(folder, config, device, args, communicator)
    while step := communicator.receive_step():
        size, arrays = step
        model.execute(Batch([], [], *arrays), size)


class InputProcessor:
    """What callers may ask of a model: knows the tokenizer and all limits, and needs no engine."""

    def __init__(self, folder, config, max_logprobs, max_model_len=None, advice=None):
        """max_model_len, advice: see plan_pool. An LLM knows both later."""
        self.folder = folder
        self.tokenizer = Tokenizer(folder)
        self.config = replace(config, eos_token_ids=config.eos_token_ids | self.tokenizer.end_ids)
        self.max_logprobs = max_logprobs
        self.max_model_len = max_model_len
        self.advice = advice
        self.default_sampling = generation_defaults(folder)     # {name of SamplingParams: value}
        end_ids = {i for i in self.config.eos_token_ids if i < config.vocab_size}
        self.grammars = Grammars(self.tokenizer, config.vocab_size, end_ids)

    def __reduce__(self):
        """For pickle: another process makes its own from the same folder. Of an LLM, only this part."""
        return InputProcessor, (self.folder, self.config, self.max_logprobs, self.max_model_len, self.advice)

    def copied(self, params):
        """A copy, checked again: a caller may have changed its own object, and may do so later."""
        params = replace(params)
        self.check_limits(params)
        return params

    def check_limits(self, params):
        """Raises TinyVLLMError for SamplingParams that only another model could follow."""
        for name in "logprobs", "prompt_logprobs":
            count = getattr(params, name)
            if count and self.max_logprobs != -1:
                check(name, count, lambda n: n <= self.max_logprobs,
                      f"at most max_logprobs, {self.max_logprobs}")
        if params.logit_bias:
            check("logit_bias", max(params.logit_bias), lambda token: token < self.config.vocab_size,
                  f"token ids below {self.config.vocab_size}")

    def check_length(self, text):
        """Raises TinyVLLMError for a text too long in any case: nobody waits for its tokens."""
        longest = self.tokenizer.longest_token
        if len(text) > self.max_model_len * longest:
            raise TinyVLLMError(f"the prompt: expected {self.max_model_len} tokens or less, of {longest} "
                                f"characters or less, got {len(text)} characters ({self.advice})")

    def encode_prompt(self, prompt):
        """The token ids of a prompt. Raises TinyVLLMError for an unanswerable prompt."""
        check("the prompt", prompt, is_sequence, "a text or a list of token ids")
        if isinstance(prompt, str):
            self.check_length(prompt)
            prompt = self.tokenizer.encode(prompt) if prompt else []
        ids = list(prompt)
        if not ids:
            raise TinyVLLMError("the prompt: expected at least one token, got none")
        if len(ids) >= self.max_model_len:
            raise TinyVLLMError(
                f"the prompt: expected less than {self.max_model_len} tokens, to leave room for one more, "
                f"got {len(ids)} ({self.advice})")
        vocab_size = self.config.vocab_size
        try:
            tokens = np.frombuffer(int_array("i", ids), np.int32)       # a prompt of 16,384 ids in 0.3 ms
            are_known = tokens.min() >= 0 and tokens.max() < vocab_size
        except (TypeError, OverflowError):                              # no integer, or a large one
            are_known = False
        if not are_known:
            wrong = next(i for i in ids if not (isinstance(i, (int, np.integer)) and 0 <= i < vocab_size))
            raise TinyVLLMError(f"the prompt: expected token ids from 0 to {vocab_size - 1}, got "
                                f"{shown(wrong)}")
        return ids


class LLM(InputProcessor):
    """A model, ready to answer: LLM("parrot").generate("Once upon a time")[0].text"""

    def __init__(self, model=None, **options):
        """options: EngineArgs' fields."""
        args = EngineArgs(model, **options)
        folder, config = open_config(args)
        self.device = open_device(args.device)
        check("kv_cache_dtype", args.kv_cache_dtype, lambda name: name == "auto" or self.device.runs_fp8,
              f"auto on {self.device.name} (fp8 needs compute capability 8.9: RTX 40 series, H100, ...)")
        super().__init__(folder, config, args.max_logprobs)
        rank_config = self.config.of_rank(args.tensor_parallel_size)
        check("tensor_parallel_size", args.tensor_parallel_size, lambda n: n <= self.device.count,
              f"at most {self.device.count}, the number of GPUs")
        check_fp8_model(rank_config, self.device)
        communicator = start_ranks(args.tensor_parallel_size, RANK_COMMAND)
        communicator.exchange((folder, rank_config, args, self.device.number))
        if communicator.size > 1:
            self.device.name = f"{communicator.size} x {self.device.name}"
        model, plan = load_model(folder, rank_config, self.device, args, communicator)
        self.max_model_len = plan.max_model_len
        self.advice = plan.advice
        allocator = BlockAllocator(plan.num_blocks, args.block_size, args.prefix_caching)
        scheduler = Scheduler(allocator, args.token_budget, args.max_num_seqs, args.enable_chunked_prefill,
                              args.static_batching, plan.max_prefill_tokens)
        self.engine = Engine(model, scheduler, args.overlap)

    def generate(self, prompts, sampling_params=None):
        """Answers prompts, all at once. Returns a RequestOutput for each, in order.

        prompts: a text or a list of token ids, or a list of several. Texts are taken unchanged: a
        chat passes the ids of tokenizer.chat(messages). sampling_params: one for all, or a list. A
        refused prompt gets an output with finish_reason "error" and the reason in `error`, and the
        rest run. A refused prompt alone raises the error."""
        check("prompts", prompts, is_sequence, "a text, a list of token ids, or a list of several")
        is_text = isinstance(prompts, str)
        is_alone = is_text or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        outputs = []
        try:
            outputs = self.submit([prompts] if is_alone else prompts, sampling_params)
            if is_alone and outputs[0].error:
                raise TinyVLLMError(outputs[0].error)
            for _ in self.finished(outputs):
                pass
            return outputs
        finally:
            self.abort(outputs)         # as run() does: an interrupt may come before run() begins

    def stream(self, prompt, sampling_params=None):
        """Yields the prompt's RequestOutput after each token; output.delta is the new text."""
        outputs = []
        try:
            outputs = self.submit([prompt], sampling_params)
            if outputs[0].error:
                raise TinyVLLMError(outputs[0].error)
            yield from self.run(outputs)
        finally:
            self.abort(outputs)         # as run() does: an interrupt may come before run() begins

    def submit(self, prompts, sampling_params=None):
        """Queues prompts and returns their RequestOutputs, for run(). All or, if interrupted, none."""
        check("prompts", prompts, lambda prompts: is_sequence(prompts) and not isinstance(prompts, str),
              "a list of prompts")
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        are_params = all(isinstance(params, SamplingParams) for params in sampling_params)
        if len(sampling_params) != len(prompts) or not are_params:
            raise TinyVLLMError(f"sampling_params: expected a SamplingParams, or a list of {len(prompts)}, "
                                f"one for each prompt, got {shown(sampling_params)}")
        distinct = {id(params): params for params in sampling_params}
        copies = {key: self.copied(params) for key, params in distinct.items()}
        outputs = []
        try:
            sequences = [self.prepare(prompt, copies[id(params)])
                         for prompt, params in zip(prompts, sampling_params)]
            outputs = [sequence.output for sequence in sequences]
            self.engine.add([sequence for sequence in sequences if not sequence.output.error])
            return outputs
        except BaseException:
            self.abort(outputs)
            raise

    def prepare(self, prompt, params):
        """The Sequence of a prompt, whose output has an error if the prompt is unanswerable."""
        output = RequestOutput([], arrival_time=time.perf_counter(),
                               logprobs=None if params.logprobs is None else [])
        matcher = None
        try:
            if params.structured_outputs:
                matcher = self.grammars.matcher(params.structured_outputs)
            output.prompt_token_ids = self.encode_prompt(prompt)
        except (TinyVLLMError, TokenizerError) as error:
            output.finish_reason = "error"
            output.error = str(error)
        num_tokens = len(output.prompt_token_ids)
        max_len = min(self.max_model_len, num_tokens + int(params.max_tokens or self.max_model_len))
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * num_tokens
        adjustments = None
        if params.changes_logits:
            end_ids = {*params.stop_token_ids} | (set() if params.ignore_eos else self.config.eos_token_ids)
            adjustments = Adjustments(params, {i for i in end_ids if i < self.config.vocab_size})
        return Sequence(params, output, StreamDecoder(self.tokenizer, params.stop), max_len, adjustments,
                        matcher)

    def run(self, outputs):
        """Steps the engine until all outputs are final. Yields each output after its new tokens
        (several, if another caller stepped in between), and once when final. An early end (an
        exception, Ctrl-C, a closed generator) gives the requests up."""
        outputs = list(outputs)             # a generator serves once
        news = deque()                      # outputs with a new token or an end
        unseen = {}                         # id(output) -> (tokens, characters) yielded, if not yet as final
        try:
            for output in outputs:
                unseen[id(output)] = (0, 0)
                self.engine.listen(output, news)
            while unseen:
                if not news:
                    self.engine.step()
                    continue
                output = news.popleft()
                key = id(output)
                is_final = output.finish_reason is not None
                text = output.text          # once: another thread's step may add more
                seen = (len(output.token_ids), len(text))
                if key not in unseen or (seen == unseen[key] and not is_final):
                    continue                # nothing new: an earlier yield has shown this
                _, num_characters = unseen[key]
                unseen[key] = seen
                if is_final:
                    del unseen[key]
                output.delta = text[num_characters:]
                yield output
        finally:
            self.abort(outputs)

    def finished(self, outputs, bar=True):
        """run(), but only final outputs. bar: count several outputs, if stderr is a terminal."""
        is_hidden = not bar or len(outputs) < 2 or not sys.stderr.isatty()
        with tqdm(total=len(outputs), unit="answer", disable=is_hidden) as count:
            final = set()
            for output in self.run(outputs):
                if output.finish_reason and id(output) not in final:
                    final.add(id(output))
                    count.update()
                    yield output

    def abort(self, outputs):
        """Gives up unfinished requests. The next step ends them and frees their pages. Any thread
        and the garbage collector may call this at any moment."""
        self.engine.aborted.extend(output for output in outputs if output.finish_reason is None)


# ==================================================================================================
# Command line
#
# stdout gets answers and nothing else; notices, errors and statistics go to stderr.
# ==================================================================================================
EXAMPLES = """examples:
  python tinyvllm.py "What is a KV cache?"                      one answer, streamed
  python tinyvllm.py "Recite Ozymandias." "Who are you?"        several at once, by continuous batching
  python tinyvllm.py --model meta-llama/Llama-3.2-1B-Instruct --temperature 0.7 --top-p 0.9 --seed 1 \\
      "Tell me a story."
"""


def parse_arguments(argv):
    """The command line as a namespace."""
    parser = ArgumentParser(prog="tinyvllm.py", description="Answer prompts with a Llama model.",
                            epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT",
        help='a prompt; several run together; "-" reads a prompt from each line of stdin')
    add_sampling_options(parser)
    add("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
    EngineArgs.add_to(parser)
    add("--watch", action="store_true", help="a live view of pages, requests and steps, on stderr")
    add("--trace", metavar="FILE",
        help="write what happened and when: FILE.html is a page to look at, FILE.json opens in Perfetto")
    add("--stats", action="store_true", help="a table of where each request's time went, on stderr")
    add("--version", action="version", version=f"tiny-vLLM {__version__}")
    args = parser.parse_args(argv)
    if not args.prompts:
        raise TinyVLLMError('expected a prompt, got none: python tinyvllm.py "What is a KV cache?", or '
                            "python chat.py for a conversation")
    given_sampling(args)                    # raises for nonsense before the model is loaded
    if args.raw and args.system is not None:
        parser.error("--raw takes no --system: write the system prompt into the prompt")
    if args.trace is not None:
        check("--trace", args.trace, lambda path: path.endswith((".json", ".html")),
              "a file that ends in .json or .html")
        check_writable("--trace", args.trace)
    return args


def open_llm(args):
    """The LLM of EngineArgs, for a program with one LLM until the end."""
    llm = LLM(**asdict(args))
    # Present objects stay. A full garbage collection would scan them all and delay a step by 10 ms.
    gc.collect()
    gc.freeze()
    return llm


def prompt_ids(llm, text, args):
    """Token ids of a prompt in the model's chat format, or raw."""
    if not text.strip():
        raise TinyVLLMError("the prompt is empty: expected some text")
    llm.check_length(text + (args.system or ""))
    if args.raw or not llm.tokenizer.has_chat_template:
        return llm.tokenizer.encode(text)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return llm.tokenizer.chat([*system, {"role": "user", "content": text}])


def submit(llm, text, args, params):
    """The RequestOutput of a prompt, with an error if the prompt is refused."""
    try:
        return llm.submit([prompt_ids(llm, text, args)], params)[0]
    except (TinyVLLMError, TokenizerError) as error:
        return RequestOutput([], finish_reason="error", error=str(error))


def answer_one(llm, texts, args, params):
    """Streams the answer to a single prompt. Returns its output, in a list."""
    output = submit(llm, texts[0], args, params)
    for _ in llm.run([output]):
        print(output.delta, end="", flush=True)
    if output.error:
        print(f"tinyvllm: {as_flags(output.error)}", file=sys.stderr)
    else:
        print(flush=True)
    return [output]


def answer_several(llm, texts, args, params):
    """Runs prompts together and returns their outputs. Answers are printed whole, each under its prompt, in
    input order. A refused prompt is reported in its place, and the rest run."""
    def show(text, output):
        if output.error:
            print(f"tinyvllm: {text[:60]!r}: {as_flags(output.error)}", file=sys.stderr)
        else:
            print(f"> {text}\n{output.text}\n", flush=True)

    outputs = [submit(llm, text, args, params) for text in texts]
    unshown = deque(zip(texts, outputs))
    try:
        for _ in llm.finished(outputs, bar=not sys.stdout.isatty()):
            while unshown and unshown[0][1].finish_reason:
                show(*unshown[0])
                unshown.popleft()
    except BaseException:       # Ctrl-C, an error of the device: no answer that is done gets lost
        for text, output in unshown:
            if output.finish_reason in ("stop", "length"):
                show(text, output)
        raise
    return outputs


def statistics(llm, outputs):
    """A line of statistics: tokens in, tokens out, and speed."""
    done = [output for output in outputs if not output.error]
    num_prompt = sum(len(output.prompt_token_ids) for output in done)
    num_new = sum(len(output.token_ids) for output in done)
    num_cached = sum(output.num_cached_tokens for output in done)
    seconds = max(output.finish_time for output in done) - min(output.arrival_time for output in done)
    first = np.median([output.first_token_time - output.arrival_time for output in done])
    cached = f" ({num_cached} cached)" if num_cached else ""
    median = "median " if len(done) > 1 else ""
    line = (f"{num_prompt} prompt tokens{cached}, {num_new} new tokens, {median}time to first token "
            f"{first:.3f} s, {num_new / seconds:.1f} tokens/s")
    stats = llm.engine.stats
    peak = llm.device.memory_bandwidth
    if peak and stats.decode_seconds:
        rate = stats.decode_bytes / stats.decode_seconds
        line += f", decode read {rate / 1e9:.0f} GB/s ({rate / peak:.0%} of the memory's {peak / 1e9:.0f})"
    return f"{line} | {llm.device.name}"


def main(argv=None):
    """Answers the prompts of the command line. Returns the exit code."""
    args = parse_arguments(argv)
    texts = []
    for prompt in args.prompts:
        if prompt == "-":
            lines = sys.stdin.read().split("\n")        # splitlines() would also split at U+2028, for one
            texts += [line.removesuffix("\r") for line in lines if line.strip()]
        else:
            texts.append(prompt)
    if not texts:
        raise TinyVLLMError("there is no prompt: expected at least one line of text on stdin")
    llm = open_llm(EngineArgs.from_namespace(args))
    if args.system is not None and not llm.tokenizer.has_chat_template:
        raise TinyVLLMError("--system needs a chat format that is known, and this model has none: use --raw "
                            "and write the system prompt into the prompt")
    if not args.raw and not llm.tokenizer.has_chat_template:
        print("tiny-vLLM: this model has no chat template: it continues each prompt as it stands (--raw: "
              "without this line)", file=sys.stderr)
    params = sampling_params(llm, args)
    has_view = args.watch or args.trace or args.stats
    with views.looking_inside(llm, args) if has_view else contextlib.nullcontext() as recorder:
        answer = answer_one if len(texts) == 1 else answer_several
        outputs = answer(llm, texts, args, params)
    cut = [output for output in outputs if output.finish_reason == "length"
           and len(output.prompt_token_ids) + len(output.token_ids) == llm.max_model_len
           and len(output.token_ids) != args.max_tokens]
    if cut:
        print(f"tiny-vLLM: cut short: {len(cut)} of {len(outputs)} answers, at {llm.max_model_len} tokens of "
              f"prompt and answer: {as_flags(llm.advice)}", file=sys.stderr)
    if not all(output.error for output in outputs):
        print(f"tiny-vLLM: {statistics(llm, outputs)}", file=sys.stderr)
    return 2 if any(output.error for output in outputs) or (recorder and recorder.has_failed) else 0


if __name__ == "__main__":
    run_program(main)
