"""Structured output: a grammar that an answer must follow, such as a JSON schema.

`Grammars.matcher` makes a matcher, which knows how far an answer has come in its grammar. Before each
token, the matcher says which tokens may come. They are the bits of a mask, and the kernel `sample`
chooses among them. So the answer follows the grammar, whatever else the model would like to say.

The package llguidance does the work, in some microseconds a token. Only requests with a grammar need
the package. These methods of its matchers are in use:

    compute_bitmask()           the mask as bytes: a bit for each token, from the lowest bit up
    validate_tokens([token])    1 if the token may come, 0 if not
    consume_token(token)        goes on by a token. False if the matcher has failed
    is_stopped()                nothing but an end of the answer may come; also True for a failed matcher
    get_error()                 why the matcher has failed: too many ways to go on, for example. "" if not
    reset()                     goes back to the beginning
"""
import json
import threading
from functools import lru_cache
from importlib.metadata import version

from device import TinyVLLMError

# The white space between two parts of JSON. llguidance's own has no end, and a model at a loss would
# write spaces up to its limit.
WHITE_SPACE = r"[ \t\r\n]{0,32}"
MAX_COMPILED = 32                       # grammars that are kept, for the next request with the same


class Grammars:
    """Makes the matchers for one model. Any thread may ask for one."""

    def __init__(self, tokenizer, vocab_size, end_ids):
        """end_ids: the tokens that end an answer."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = sorted(end_ids)
        self.lock = threading.Lock()
        self.vocabulary = None          # llguidance's. For 128,256 tokens it takes a second to make
        self.compiled = lru_cache(MAX_COMPILED)(self.compile)

    def matcher(self, structured_outputs):
        """A new matcher for {"json": schema} or {"grammar": text, in llguidance's form of Lark}. Quick, if
        somebody has asked for the grammar lately. Raises TinyVLLMError for a grammar that llguidance does
        not take."""
        [(kind, grammar)] = structured_outputs.items()
        try:
            text = json.dumps(grammar) if kind == "json" else grammar
            return self.compiled(kind, text).deep_copy()
        except (TypeError, ValueError, RecursionError) as error:    # no JSON; a refusal by llguidance
            raise TinyVLLMError("structured output: expected a schema or a grammar that llguidance can "
                                f"follow, got the error: {' '.join(str(error).split()):.300}") from None

    def compile(self, kind, text):
        """A matcher that stays at the beginning, to be copied. Raises ValueError for a bad grammar."""
        llguidance = the_package()
        with self.lock:                 # whoever asks for another grammar, which is ready, does not wait
            if not self.vocabulary:
                words = llguidance.TokenizerWrapper(Words(self.tokenizer, self.vocab_size, self.end_ids))
                self.vocabulary = llguidance.LLTokenizer(words, eos_token=self.end_ids)
        if kind == "json":
            text = llguidance.LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": WHITE_SPACE})
        matcher = llguidance.LLMatcher(self.vocabulary, text, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


def the_package():
    """llguidance. Raises TinyVLLMError if there is none, or an old one."""
    try:
        import llguidance
        found = version("llguidance")
    except ModuleNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < (1, 8):
        raise TinyVLLMError("structured output: expected the Python package llguidance, 1.8.0 or newer, "
                            f"found {found}: pip install --upgrade llguidance")
    return llguidance


class Words:
    """A tokenizer in the form that llguidance asks for. (llguidance reads tokenizer.json itself, too. But
    there <tool_call> is never text, and a text <|eot_id|> becomes the token of this name.)"""
    bos_token_id = None

    def __init__(self, tokenizer, vocab_size, end_ids):
        self.tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]     # b"": never allowed

    def __call__(self, text):
        """The ids of a text in the middle of an answer. Raises an error for bytes."""
        if not self.tokenizer.drops_first_space:
            return self.tokenizer.encode(text, add_bos=False)
        # Llama 2's tokenizer puts a space before a text. No token spans the newline and the text.
        ids = self.tokenizer.encode("\n" + text, add_bos=False)
        newline = self.tokenizer.encode("\n", add_bos=False)[-1]
        return ids[ids.index(newline) + 1:]
