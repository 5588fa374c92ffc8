"""Text to token ids and back: `Tokenizer` for prompts and chats, `StreamDecoder` for answers.

The `tokenizers` package splits and merges as the model's tokenizer.json says. This file adds:
- **Chat prompts** by the model's own chat template, a program in the language Jinja.
- **Text from a user stays text.** The token `<|eot_id|>` ends a turn, and a user who could type
  that token could go on in the system's voice. Here a typed `<|eot_id|>` becomes the ordinary
  tokens of its ten characters; only the chat template writes the token.
- **Streaming.** A token is a string of *bytes*: the four bytes of "🦜" may be four tokens. A stop
  string may begin in one token and end in another.
"""
import codecs
import json
import re
from collections.abc import Iterable
from datetime import date, datetime
from functools import lru_cache, partial
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, models, processors

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SPECIAL_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# These tokens end an answer where the chat template writes them, as the EOS token does.
ENDS_OF_TURNS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
# A template searches a text by content.split('</think>'), or by '</think>' in content.
SEARCH = re.compile(r"""\.(?:split|startswith|endswith|replace)\(['"][^'"]+|['"][^'"]+['"] (?:not )?in """)
ROLE = re.compile(r"[\w. -]+")  # a template may write '<|' + role + '|>': no role may hold "|>"
GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # "noncharacters", which Unicode keeps out of texts


class TokenizerError(Exception):
    """A user's mistake, in one line: expected X, got Y, do Z."""


def check_regular(file):
    """Raises OSError for a folder, a FIFO or a device: to read such a file might never end."""
    if file.exists() and not file.is_file():
        raise OSError("expected a regular file, got a folder, a FIFO or a device")


# --------------------------------------------------------------------------------------------------
# Text to ids, ids to bytes
#
# A vocabulary is stored as text. Llama-like models write a token's bytes in one of two ways:
#   byte-level (GPT-2, Llama 3, SmolLM2): one printable character a byte; " é" (20 C3 A9) is "ĠÃ©"
#   sentencepiece (Llama 1 and 2, TinyLlama): "▁" is a space, "<0xF0>" a byte of a rare character
# --------------------------------------------------------------------------------------------------
# Byte-level: a printable Latin-1 character is its own byte; U+0100, U+0101, ... are the rest.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(UNPRINTABLE)}


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json and, for chats, the model's chat template."""

    def __init__(self, folder):
        file = Path(folder) / "tokenizer.json"
        try:
            check_regular(file)
            self._hf = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises no narrower kind: missing, cut off, too new
            raise TokenizerError(f"expected a readable {file}, got: {error}. Pass a model's folder, "
                                 "download the file again, or upgrade `tokenizers`") from error
        self._added_tokens = self._hf.get_added_tokens_decoder()  # by id
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        if not self._hf.get_vocab(with_added_tokens=False):
            raise TokenizerError(f"expected a vocabulary in {file}, got none: download the file again")
        self.vocab_size = 1 + max(vocabulary.values())  # the embedding may have more rows
        self.longest_token = max(map(len, vocabulary))  # characters
        decoder = json.loads(self._hf.decoder.__getstate__()) if self._hf.decoder else {"type": "none"}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        if not {"ByteLevel", "Metaspace", "ByteFallback"} & set(steps):
            raise TokenizerError(f"expected a ByteLevel, Metaspace or ByteFallback decoder in {file}, got "
                                 f"{', '.join(steps)}. Use a Llama-like model: this engine runs no other")
        self._byte_level = "ByteLevel" in steps
        # Llama 2 encodes "Hi" as "▁Hi": decoding removes one space from the start of a text.
        prepend_scheme = steps.get("Metaspace", {}).get("prepend_scheme", "never")
        self.drops_first_space = "Strip" in steps or prepend_scheme != "never"
        self._bytes = {}  # token id -> its bytes, once asked for
        self._encoders = {}  # guard -> its encoder, once asked for
        self._read_config(file.parent)
        self._find_marks()

    def _read_config(self, folder: Path):
        """Reads the chat templates, the texts of special tokens, and whether BOS begins a text."""
        file = folder / "tokenizer_config.json"
        template_file = folder / "chat_template.jinja"
        try:
            check_regular(file)
            check_regular(template_file)
            config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            template = config.get("chat_template") or ""
            if template_file.is_file():
                template = template_file.read_text("utf-8")
            named = template if isinstance(template, list) else [{"name": "default", "template": template}]
            self._templates = {entry["name"]: entry["template"] for entry in named}
            tokens = {name: config[name] for name in SPECIAL_TOKENS if config.get(name)}
            self._special_tokens = {name: text["content"] if isinstance(text, dict) else text
                                    for name, text in tokens.items()}
            for name, text in {**self._templates, **self._special_tokens}.items():
                if not isinstance(text, str):
                    raise TypeError(f"the {name} {text!r:.40}")
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise TokenizerError(f"expected valid JSON in {file} and a text in {template_file.name}, "
                                 f"got: {error}. Download the file again") from error
        self.has_chat_template = bool(self._templates.get("default"))  # a base model has none: send raw text
        # Where tokenizer.json adds nothing, add_bos_token counts in Transformers' Llama class (version 4).
        bos = self._special_tokens.get("bos_token", "")
        wants_bos = config.get("add_bos_token") is True and "Llama" in str(config.get("tokenizer_class"))
        if wants_bos and self.token_id(bos) is not None and not self._hf.num_special_tokens_to_add(False):
            self._hf.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, self.token_id(bos))])

    def _find_marks(self):
        """Finds the marks: the special tokens, and other added tokens that the chat template writes, such
        as Qwen's <think>. No text of a user becomes a mark; it may become any other added token."""
        source = "".join(self._templates.values())
        marks = [token for token in self._added_tokens.values()
                 if token.content.strip() and (token.special or token.content in source)]
        self._marks = [token.content for token in marks]
        self._beginnings = tuple({mark[:n] for mark in self._marks for n in range(1, len(mark))})
        # The finder is a tokenizer without a vocabulary. Of a text, it sees the marks and nothing else.
        self._finder = tokenizers.Tokenizer(models.BPE())
        self._finder.normalizer = self._hf.normalizer
        self._finder.add_tokens([AddedToken(token.content, single_word=token.single_word,
                                            normalized=token.normalized) for token in marks])
        searches = " ".join(SEARCH.findall(source))
        self._sought = {mark for mark in self._marks if mark in searches}
        ends = [name for name in ENDS_OF_TURNS if name in source]
        ends.append(self._special_tokens.get("eos_token", ""))
        self.end_ids = frozenset(map(self.token_id, ends)) - {None}  # the ids that end an answer

    def token_id(self, name: str) -> int | None:
        """The id of the token written `name`, None if there is no such token."""
        return self._hf.token_to_id(name)

    def encode(self, text: str, add_bos: bool = True, guard: str | None = None) -> list[int]:
        """A text's ids. `add_bos`: with BOS, if the model's files say so (Llama), or without (SmolLM2).
        `guard`: the character in front of each mark in a text of chat(); None: there are no marks."""
        try:
            encoder, meaning = self._encoder(guard or next(char for char in GUARDS if char not in text))
            # encode() would stop all other threads meanwhile: it holds the GIL.
            encoding = encoder.encode_batch([text], add_special_tokens=add_bos)[0]
        except TypeError as error:  # no str, or half of a surrogate pair (JSON's "\ud83e")
            raise TokenizerError(f"expected a str of valid Unicode, got {text!a:.80}") from error
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # Rust's PanicException: the regex gives up on a long run of spaces
            raise TokenizerError("expected a text that the tokenizer can split, got one of "
                                 f"{len(text)} characters ({error}): shorten it") from error
        tokens = zip(encoding.ids, encoding.special_tokens_mask)
        return [i for token, is_bos in tokens for i in ([token] if is_bos else meaning.get(token, [token]))]

    def _encoder(self, guard):
        """(the model's tokenizer, but with guard + mark as the name of each mark; what its ids mean)"""
        if guard not in self._encoders:
            encoder = tokenizers.Tokenizer(self._hf.model)
            for part in "normalizer", "pre_tokenizer", "post_processor":
                setattr(encoder, part, getattr(self._hf, part))
            marks = set(self._marks)
            names = {i: guard + token.content if token.content in marks else token.content
                     for i, token in self._added_tokens.items()}
            # The encoder numbers new names itself. After this many names, its numbers are no id of the model.
            encoder.add_tokens([guard + str(n) for n in range(self.vocab_size - encoder.get_vocab_size())])
            encoder.add_tokens([AddedToken(**token.__getstate__() | {"content": names[i]})
                                for i, token in self._added_tokens.items()])
            meaning = {encoder.token_to_id(name): [i] for i, name in names.items()}
            # A Unigram vocabulary that has "<s>" also finds it in a user's text. The characters are meant.
            for mark in self._marks:
                if (i := encoder.model.token_to_id(mark)) is not None:
                    meaning[i] = [piece.id for char in mark for piece in encoder.model.tokenize(char)]
            self._encoders[guard] = (encoder, meaning)
        return self._encoders[guard]

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes; none for special tokens and ids past the vocabulary (padded logits)."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._make_bytes(token_id)
        return self._bytes[token_id]

    def _make_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_tokens:
            token = self._added_tokens[token_id]
            return b"" if token.special else token.content.encode()
        token = self._hf.id_to_token(token_id) or ""
        if self._byte_level and BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[char] for char in token)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
        return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()

    def decode(self, ids) -> str:
        """The whole text of the ids without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        text = "".join(map(stream.push, ids)) + stream.flush()
        return text.removeprefix(" ") if self.drops_first_space else text

    # ----------------------------------------------------------------------------------------------
    # Chat prompts
    #
    # A chat template is a program. It writes the messages as one text, with marks between the turns.
    # In that text, the template's marks look like marks that a user has typed. A guard tells them
    # apart: a character that is in no message, here "°".
    #   1. Before the template runs, guards break up the marks in messages: <°|°e°o°t°_°i°d°|°>°.
    #      So each mark that is whole in the template's text is the template's own. (One exception:
    #      a mark for which the template searches the assistant's messages stays whole there.)
    #   2. Each whole mark gets a guard in front, and the other guards go. The package then encodes
    #      the text, with °<|eot_id|> as the name of the token. It takes <|eot_id|> for plain text.
    # The ids are those of Transformers, except where a message holds a mark.
    # ----------------------------------------------------------------------------------------------
    def chat(self, messages: list[dict], today: date | None = None, tools: list | None = None,
             variables: dict | None = None) -> list[int]:
        """The ids of the prompt for [{"role": "user", "content": "Hi"}, ...], up to the answer.
        today: the date, for a template that asks for one. tools: definitions of functions, as JSON.
        variables: more variables of the template, such as {"enable_thinking": False} for Qwen3."""
        if not self.has_chat_template:
            raise TokenizerError("expected a model with a chat template, got none: send raw text")
        messages = list(map(plain_message, messages if isinstance(messages, Iterable) else []))
        if not messages:
            raise TokenizerError("expected at least one message, got none")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        try:
            data = json.dumps([messages, tools or None, variables or {}], ensure_ascii=False)
            messages, tools, variables = json.loads(data.encode())  # a template gets no objects with methods
            guard = next(char for char in GUARDS if char not in data)
            # A template may search past answers for marks: Qwen3's drops all text up to </think>.
            messages = [self._hide(message, guard, self._sought if message["role"] == "assistant" else ())
                        for message in messages]
            text = compiled(self._templates[name]).render(
                messages=messages, tools=self._hide(tools, guard, ()), documents=None,
                add_generation_prompt=True, strftime_now=partial(strftime, today or datetime.now()),
                **self._special_tokens, **self._hide(variables, guard, ()))
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise TokenizerError("expected messages of Unicode, got half of a surrogate pair") from error
        except Exception as error:  # a program can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TokenizerError("expected messages that the model's chat template can write, got the error: "
                                 f"{reason:.300}. Change the messages, or send raw text") from error
        found = self._finder.encode(text)
        parts = []
        start = 0
        for i, (_, end) in zip(found.ids, found.offsets):
            mark = self._marks[i]
            parts += [text[start:end - len(mark)].replace(guard, ""), guard + mark]
            start = end
        parts.append(text[start:].replace(guard, ""))
        return self.encode("".join(parts), add_bos=False, guard=guard)  # the template has written BOS

    def _hide(self, value, guard, kept):
        """A JSON value with guards in all marks of its strings, except for the marks in `kept`."""
        if isinstance(value, dict):
            return {self._hide(key, guard, ()): self._hide(item, guard, kept) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hide(item, guard, kept) for item in value]
        if not isinstance(value, str):
            return value
        for mark in self._marks:
            if mark in value and mark not in kept:
                value = value.replace(mark, guard.join(mark) + guard)
        # A template may join strings: no string may end with the beginning of a mark.
        return value + guard if value.endswith(self._beginnings) else value


@lru_cache(maxsize=8)
def compiled(source):
    """A compiled chat template. The sandbox keeps a stranger's program from Python's insides."""
    def raise_exception(message):
        raise TemplateError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own is for HTML
    # {% generation %}...{% endgeneration %} marks answers for a training program: here, a plain block.
    source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
    return environment.from_string(re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source))


def strftime(moment, format):
    """moment.strftime(format) with English names, whatever the locale is."""
    day = DAYS[moment.weekday()]
    month = MONTHS[moment.month - 1]
    names = {"%A": day, "%a": day[:3], "%B": month, "%b": month[:3]}
    return moment.strftime(re.sub("%.", lambda code: names.get(code[0], code[0]), format))


def plain_message(message):
    """A message as all templates know it: its content is one text, and no value is None."""
    try:
        fields = {name: value for name, value in message.items() if value is not None}
        role = "system" if fields["role"] == "developer" else fields["role"]
        content = fields.get("content", "" if role == "assistant" else None)
        if isinstance(content, list):  # parts of a text, as in OpenAI's API
            content = "".join(part["refusal" if part["type"] == "refusal" else "text"] for part in content)
        if not (ROLE.fullmatch(role) and isinstance(content, str)):
            raise TypeError
    except (AttributeError, KeyError, TypeError) as error:
        raise TokenizerError("expected messages with a role (a word) and a content (a text), got "
                             f"{message!r:.100}") from error
    # DeepSeek's template asks whether `content is none` in an answer that calls tools.
    return fields | {"role": role, "content": content or (None if fields.get("tool_calls") else "")}


class StreamDecoder:
    """The text of tokens that arrive one by one: print what `push` returns, and `flush` at the end.

    `push` returns a character once its last byte is there, and U+FFFD at once for bytes that can no
    longer become a character. The state is at most three bytes, and the longest end of the text that
    may be the beginning of a string in `stop`: a token costs the same in any text (vLLM decodes a
    short window of tokens twice and compares). `Tokenizer.decode` runs this code as well, so a
    streamed answer and a whole answer cannot differ.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.reset()

    def reset(self):
        """Begins a new text."""
        self._utf8.reset()
        self._held = ""  # the end of the text, held back
        self.has_stopped = False

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that this token makes certain; often "" within an emoji, and "" after a stop string.
        may_stop: whether a stop string that ends in this token counts."""
        new = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._advance(new, may_stop)

    def flush(self) -> str:
        """The rest: the text held back, and U+FFFD if the last character is incomplete."""
        text = self._advance(self._utf8.decode(b"", final=True), may_stop=True) + self._held
        self._held = ""
        return text

    def _advance(self, new, may_stop) -> str:
        """Appends new text. Returns the text that can no longer belong to a stop string."""
        if not self._stop:
            return new
        if self.has_stopped:
            return ""
        text = self._held + new
        # A stop string that ended before the new text did not count.
        starts = [text.find(stop, max(0, len(self._held) + 1 - len(stop))) for stop in self._stop]
        start = min((start for start in starts if start >= 0), default=None)
        if start is not None and may_stop:
            self.has_stopped = True
            self._held = ""
            return text[:start]
        beginnings = [n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1))
                      if text.endswith(stop[:n])]
        num_certain = len(text) - max(beginnings, default=0)
        self._held = text[num_certain:]
        return text[:num_certain]
