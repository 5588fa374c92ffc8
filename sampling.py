"""What a request asks of the sampler: `SamplingParams`, and `Adjustments`, the changed logits.

The kernel `sample` draws a token from a row of logits. Penalties, a bias and a ban change the
logits of a few tokens: those of the text so far, and those that a request names. So a request
brings a list of these tokens, and no count for every word of the vocabulary.

The list goes to the kernel as entries of three 32-bit numbers (struct Entry in kernels.cu):

    token    each token has one entry at most
    count    how often the token stands in the answer; 0: in the prompt alone; ABSENT: in neither, or no
             penalty asks for the count
    bias     added to the logit, a float32; -inf: the token cannot be drawn

One token is not in the list: the newest token of a running answer, which only the GPU knows (see
Engine). The kernel counts that token itself. Where the list has no entry for the token, the kernel
needs the place of one more entry, and this place is the last of the list: see SPARE.
"""
import contextlib
from array import array as int_array
from dataclasses import dataclass, field

import numpy as np

from device import check, is_int, is_number

MAX_FLOAT32 = float(np.finfo(np.float32).max)
ENTRY_INTS = 3                          # numbers of an entry
ABSENT = -1                             # the count of a token that is in no text
SPARE = int_array("i", [-1, ABSENT, 0])     # an entry without a token, for the newest token


def is_bias(item):
    """Whether the item is a pair of a token id and a number to add to the token's logit."""
    token, bias = item
    return is_int(token, 0) and is_number(bias, -100, 100)


def is_grammar(item):
    """Whether the item is a pair of a kind of grammar and a grammar."""
    kind, grammar = item
    return (kind == "json" and isinstance(grammar, dict)) or (kind == "grammar" and isinstance(grammar, str))


@dataclass
class SamplingParams:
    """How to choose tokens and when to stop, named as in vLLM. Nonsense raises TinyVLLMError.

    The logits are changed first: the bias is added, then come the penalties for tokens of the text.
    Then the temperature divides. Then min_p, top_k and top_p, in this order, drop tokens."""
    temperature: float = 0.0            # 0: greedy
    top_k: int = 0                      # keep the k most probable tokens; 0 or -1: all
    top_p: float = 1.0                  # of the kept tokens, keep the fewest that together reach p
    min_p: float = 0.0                  # drop tokens with less than p times the best token's probability
    presence_penalty: float = 0.0       # subtracted from the logit of each token of the answer
    frequency_penalty: float = 0.0      # ... times the number of times that the token is there
    repetition_penalty: float = 1.0     # divides the logits (below 0: multiplies) of prompt and answer
    logit_bias: dict = field(default_factory=dict)      # {token id: added to the logit, -100 to 100}
    seed: int | None = None             # None: another seed for every request
    max_tokens: int | None = 256        # None: as many as the context holds
    min_tokens: int = 0                 # so many tokens come before any end but a limit's or a grammar's
    ignore_eos: bool = False            # go on after the model's own end of an answer
    stop: tuple = ()                    # texts that end the answer, and are not in the answer
    stop_token_ids: tuple = ()          # end the answer, beside the model's own eos tokens
    logprobs: int | None = None         # report log-probabilities: of each token, and of the n best
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    # What the answer must follow: {"json": JSON schema, a dict} or {"grammar": text}, see grammar.py.
    structured_outputs: dict | None = None

    def __post_init__(self):
        def want(name, is_good, expected):
            check(name, getattr(self, name), is_good, expected)
        want("temperature", lambda t: is_number(t, 0, MAX_FLOAT32),
             f"0 (greedy) or more, up to {MAX_FLOAT32:.1e}")
        want("top_k", lambda k: is_int(k, -1), "a whole number of 1 or more, or 0 for all")
        want("top_p", lambda p: is_number(p, 0, 1) and p > 0, "more than 0 and at most 1")
        want("min_p", lambda p: is_number(p, 0, 1), "a number from 0 to 1")
        for name in "presence_penalty", "frequency_penalty":
            want(name, lambda x: is_number(x, -2, 2), "a number from -2 to 2")
        want("repetition_penalty", lambda x: is_number(x, 0, MAX_FLOAT32) and x > 0,
             "a number above 0; 1 for no penalty")
        with contextlib.suppress(TypeError, ValueError):
            self.logit_bias = dict(self.logit_bias or {})               # the caller may change its own later
        want("logit_bias", lambda biases: all(map(is_bias, biases.items())),
             "a dict {token id: number from -100 to 100}")
        want("seed", lambda seed: seed is None or is_int(seed, 0, 2**64 - 1),
             "a whole number from 0 to 2^64 - 1")
        want("max_tokens", lambda n: n is None or is_int(n), "a whole number of 1 or more")
        want("min_tokens", lambda n: is_int(n, 0) and n <= (self.max_tokens or n),
             "a whole number from 0 to max_tokens")
        want("ignore_eos", lambda flag: isinstance(flag, (bool, np.bool_)), "True or False")
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name in "stop", "stop_token_ids":
            if not isinstance(getattr(self, name), (str, bytes)):
                with contextlib.suppress(TypeError):
                    setattr(self, name, tuple(getattr(self, name) or ()))   # a generator serves once
        want("stop", lambda texts: all(isinstance(text, str) and text for text in texts),
             "a text, or a list of texts, none of them empty")
        want("stop_token_ids", lambda ids: isinstance(ids, tuple) and all(is_int(i, 0) for i in ids),
             "a list of token ids")
        for name in "logprobs", "prompt_logprobs":
            want(name, lambda n: n is None or is_int(n, 0), "a whole number of 0 or more")
        want("structured_outputs", lambda wanted: wanted is None or (
            len(wanted) == 1 and all(map(is_grammar, wanted.items()))),
             'a dict {"json": JSON schema, as a dict} or {"grammar": text}')

    @property
    def has_penalty(self):
        """Whether the logits depend on the text so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def penalties(self):
        """As the kernel takes them."""
        return self.presence_penalty, self.frequency_penalty, self.repetition_penalty

    @property
    def changes_logits(self):
        """Whether tokens have entries: see Adjustments."""
        return self.has_penalty or bool(self.logit_bias) or self.min_tokens > 0


class Adjustments:
    """The entries of a request: the tokens whose logits are changed before the next draw."""

    def __init__(self, params, end_ids):
        """end_ids: tokens that end an answer, which min_tokens bans at first."""
        self.params = params
        self.end_ids = end_ids
        self.restart()

    def restart(self):
        """Forgets the text."""
        self.is_banned = None           # whether no end may come; None: no entries yet

    def begin(self, is_banned):
        """Makes the entries of bias and ban, before any token of the text is counted."""
        self.is_banned = is_banned
        self.entries = int_array("i")
        self.index = {}                 # token -> index of the token's entry in `entries`
        self.num_counted = 0            # the position up to which tokens were counted
        biases = dict(self.params.logit_bias)
        if is_banned:
            biases |= dict.fromkeys(self.end_ids, -np.inf)
        for token, bias in biases.items():
            self.add(int(token), ABSENT, int(np.float32(bias).view(np.int32)))

    def add(self, token, count, bias):
        """Appends an entry."""
        self.index[token] = len(self.entries)
        self.entries.extend((token, count, bias))

    def count(self, token, number):
        """Counts a token of the text. number: 0 for a token of the prompt, else 1."""
        at = self.index.get(token)
        if at is None:
            self.add(token, number, 0)
        else:
            self.entries[at + 1] = max(self.entries[at + 1], 0) + number

    def up_to(self, token_ids, num_prompt_tokens):
        """The entries for the token after these, as an array("i"). token_ids: of prompt and answer;
        the last may be a placeholder, a negative number, for a token that only the GPU knows."""
        params = self.params
        is_banned = len(token_ids) - num_prompt_tokens < params.min_tokens
        if is_banned != self.is_banned:
            self.begin(is_banned)
        if not params.has_penalty:
            return self.entries
        # Only repetition_penalty asks for the prompt.
        start = 0 if params.repetition_penalty != 1 else num_prompt_tokens
        has_unknown = token_ids[-1] < 0
        for position in range(max(start, self.num_counted), len(token_ids) - has_unknown):
            self.count(token_ids[position], 0 if position < num_prompt_tokens else 1)
            self.num_counted = position + 1
        return self.entries + SPARE if has_unknown else self.entries
