"""Text to token ids and back: `Tokenizer` for prompts and chats, `StreamDecoder` for answers.

The `tokenizers` package splits and merges as the model's tokenizer.json says. This file adds:
- **Text from a user stays text.** The special token `<|eot_id|>` ends a turn, and a user who could
  type that token could go on in the system's voice. Here a typed `<|eot_id|>` becomes the ordinary
  tokens of its ten characters; only `chat` inserts special tokens.
- **Chat prompts** without a Jinja interpreter, in two layouts: Llama 3's and ChatML (SmolLM2).
  Marks in the model's own template show the layout, the date line and the default system prompt.
- **Streaming.** A token is a string of *bytes*: the four bytes of "🦜" may be four tokens.
"""
import codecs
import json
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import tokenizers

ROLES = ("system", "user", "assistant")
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()  # strftime would obey the locale
LLAMA_31_DATE = date(2024, 7, 26)  # the templates of Llama 3.1 and 3.3 give this date on every day
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
CHATML = ("<|im_start|>", "<|im_end|>")


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
        self._hf.encode_special_tokens = True  # despite its name: a typed "<|eot_id|>" is text
        self._hf.no_truncation()  # a tokenizer.json can still hold the lengths of its training run
        self._hf.no_padding()
        added_tokens = self._hf.get_added_tokens_decoder()
        self._added_text = {i: "" if token.special else token.content for i, token in added_tokens.items()}
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        if not self._hf.get_vocab(with_added_tokens=False):
            raise TokenizerError(f"expected a vocabulary in {file}, got none: download the file again")
        self.vocab_size = 1 + max(vocabulary.values())  # the embedding may have more rows
        self.longest_token = max(map(len, vocabulary))  # characters
        self._bytes = {}  # token id -> its bytes, once asked for
        decoder = json.loads(self._hf.decoder.__getstate__()) if self._hf.decoder else {"type": "none"}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        if not {"ByteLevel", "Metaspace", "ByteFallback"} & set(steps):
            raise TokenizerError(f"expected a ByteLevel, Metaspace or ByteFallback decoder in {file}, got "
                                 f"{', '.join(steps)}. Use a Llama-like model: this engine runs no other")
        self._byte_level = "ByteLevel" in steps
        # Llama 2 encodes "Hi" as "▁Hi": decoding removes one space from the start of a text.
        prepend_scheme = steps.get("Metaspace", {}).get("prepend_scheme", "never")
        self.drops_first_space = "Strip" in steps or prepend_scheme != "never"
        self._read_config(file.parent)

    def _read_config(self, folder: Path):
        """Reads the chat template ("" if there is none), its layout, and the BOS token's name."""
        file = folder / "tokenizer_config.json"
        template_file = folder / "chat_template.jinja"
        try:
            check_regular(file)
            check_regular(template_file)
            config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            template = config.get("chat_template") or ""
            if template_file.is_file():
                template = template_file.read_text("utf-8")
            if isinstance(template, list):  # several templates, each with a name
                template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
            bos = config.get("bos_token") or ""
            self._bos_token = bos["content"] if isinstance(bos, dict) else bos
            if not isinstance(template, str) or not isinstance(self._bos_token, str):
                raise TypeError(f"the chat_template {template!r:.40}, the bos_token {bos!r:.40}")
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            # Unreadable, no JSON, or JSON of another form.
            raise TokenizerError(f"expected valid JSON in {file} and a text in {template_file.name}, "
                                 f"got: {error}. Download the file again") from error
        self._template = template
        self._layout = next((layout for layout in (LLAMA_3, CHATML) if layout[0] in template
                             and None not in map(self.token_id, layout)), None)
        self.has_chat_template = self._layout is not None  # a base model has none: send raw text

    def token_id(self, name: str) -> int | None:
        """The id of the token written `name`, None if there is no such token."""
        return self._hf.token_to_id(name)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """A text's ids. `add_bos`: as tokenizer.json says, with BOS (Llama) or none (SmolLM2)."""
        try:
            # Of a batch of one: unlike encode(), encode_batch() lets other threads run.
            return self._hf.encode_batch([text], add_special_tokens=add_bos)[0].ids
        except TypeError as error:  # no str, or half of a surrogate pair (JSON's "\ud83e")
            raise TokenizerError(f"expected a str of valid Unicode, got {text!a:.80}") from error
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # Rust's PanicException: the regex gives up on a long run of spaces
            raise TokenizerError("expected a text that the tokenizer can split, got one of "
                                 f"{len(text)} characters ({error}): shorten it") from error

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes; none for special tokens and ids past the vocabulary (padded logits)."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._make_bytes(token_id)
        return self._bytes[token_id]

    def _make_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        token = self._hf.id_to_token(token_id) or ""
        if self._byte_level and BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[char] for char in token)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
        return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()

    def decode(self, ids) -> str:
        """The text of the ids without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    # ----------------------------------------------------------------------------------------------
    # Chat prompts
    #
    # Special tokens separate the turns of a chat; the text ends where the answer begins. `chat`
    # inserts special tokens by id and encodes each text between by itself: the ids of the rendered
    # prompt, since no merge crosses a special token. Not handled: tools, images, other layouts.
    # ----------------------------------------------------------------------------------------------
    def chat(self, messages: list[dict], today: date | None = None) -> list[int]:
        """The ids of the prompt for [{"role": "user", "content": "Hi"}, ...], up to the answer.
        `today`: the date for Llama 3.1's system prompt; default: the date of the chat template."""
        if not self.has_chat_template:
            raise TokenizerError("expected a Llama 3 or ChatML chat template, got none: send raw text")
        messages = list(messages) if isinstance(messages, Iterable) else []  # a generator serves once
        if not messages:
            raise TokenizerError("expected at least one message, got none")
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if not isinstance(content, str) or message.get("role") not in ROLES:
                raise TokenizerError(f"expected messages with a role ({', '.join(ROLES)}) and a content that "
                                     f"is a str, got {message!r:.100}")
        turns = [(message["role"], message["content"]) for message in messages]
        parts = self._llama3(turns, today) if self._layout == LLAMA_3 else self._chatml(turns)
        # A part is a token (int) or a text (str). Users send only str, so nobody can forge a token.
        parts_ids = [[part] if isinstance(part, int) else self.encode(part, add_bos=False) for part in parts]
        return [i for part in parts_ids for i in part]

    def _llama3(self, turns, today) -> list[int | str]:
        """A turn is <|start_header_id|>role<|end_header_id|>, a blank line, the trimmed content,
        <|eot_id|>. From 3.1 on, the first turn is always a system turn and opens with two dates."""
        start, end, eot, begin = map(self.token_id, LLAMA_3)
        turns = [(role, content.strip()) for role, content in turns]
        if "Cutting Knowledge Date" in self._template:
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            if today is None:  # 3.2 asks for the day's date, 3.1 and 3.3 hold a fixed date
                today = date.today() if "strftime_now" in self._template else LLAMA_31_DATE
            day = f"{today.day:02} {MONTHS[today.month - 1]} {today.year}"
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n"
            turns.insert(0, ("system", dates + system))
        # Blank line and content are one text: a token may hold newlines and content.
        parts = [part for role, content in turns for part in (start, role, end, "\n\n" + content, eot)]
        return [begin, *parts, start, "assistant", end, "\n\n"]

    def _chatml(self, turns) -> list[int | str]:
        """A turn is <|im_start|>role, a newline, the content untrimmed, <|im_end|>, a newline."""
        start, end = map(self.token_id, CHATML)
        # The templates of SmolLM2 and Qwen 2 hold a default system prompt: a literal in one turn.
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{<]+)<\|im_end\|>", self._template)
        if default and turns[0][0] != "system":
            turns = [("system", default[1]), *turns]
        bos = [self.token_id(self._bos_token)] if self._bos_token and "bos_token" in self._template else []
        parts = [part for role, content in turns for part in (start, f"{role}\n{content}", end, "\n")]
        return [*bos, *parts, start, "assistant\n"]


class StreamDecoder:
    """The text of tokens that arrive one by one: print what `push` returns, and `flush` at the end.

    `push` returns a character once its last byte is there, and U+FFFD at once for bytes that can no
    longer become a character. The state is at most three bytes: a token costs the same in any text
    (vLLM decodes a short window of tokens twice and compares). `Tokenizer.decode` runs this code as
    well, so a streamed answer and a whole answer cannot differ.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.reset()

    def reset(self):
        """Begins a new text."""
        self._utf8.reset()
        self._drop_space = self._tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often "" within an emoji."""
        data = self._tokenizer.token_bytes(token_id)
        if self._drop_space and data:  # the tokenizer adds a space to the start of the text only
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, else ""."""
        return self._utf8.decode(b"", final=True)
