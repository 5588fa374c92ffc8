"""Text to token ids and back: `Tokenizer` for prompts and chats, `StreamDecoder` for answers that arrive token by token.

The `tokenizers` package splits and merges as the model's tokenizer.json says. This file adds what a server needs around it:

- **What a user types stays text.** `<|eot_id|>` ends a turn if it becomes *the* token, and its author could go on in the
  system's voice. Here it becomes the ordinary tokens of its ten characters; only `chat` inserts special tokens.
- **Chat prompts**, without a Jinja interpreter: two layouts, Llama 3's and ChatML (SmolLM2). The model's own template is
  searched for the marks that say which one it is, down to the date line and the default system prompt.
- **Streaming**: a token is a string of *bytes*, and an emoji can be spread over four of them.
"""

import codecs
import json
import re
from datetime import date
from functools import lru_cache
from pathlib import Path

import tokenizers

ROLES = ("system", "user", "assistant")
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()  # strftime("%b") would speak the machine's language
LLAMA_31_DATE = date(2024, 7, 26)  # what the templates of Llama 3.1 and 3.3 call today, whatever the day
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
CHATML = ("<|im_start|>", "<|im_end|>")


class TokenizerError(Exception):
    """A user's mistake, in one line: what was expected, what came, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Text to ids, ids to bytes
#
# A vocabulary is stored as text, but its tokens are bytes: the four bytes of "🦜" may be four tokens. Llama-like models
# write bytes as text in one of two ways:
#   byte-level (GPT-2, Llama 3, SmolLM2): every byte is one printable character, so " é" (20 C3 A9) reads "ĠÃ©";
#   sentencepiece (Llama 1 and 2, TinyLlama): "▁" is a space, and what is not in the vocabulary falls back to "<0xF0>".
# ---------------------------------------------------------------------------------------------------------------------
# The byte-level alphabet: the printable bytes of Latin-1 are themselves, the other 68 are U+0100, U+0101, ... in order.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, and for chats tokenizer_config.json or chat_template.jinja."""

    def __init__(self, folder):
        file = Path(folder) / "tokenizer.json"
        try:
            self._hf = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception, whether the file is missing, cut off or too new
            raise TokenizerError(f"expected a readable {file}, got: {error}. Pass the model's folder, download the file "
                                 "again, or upgrade `tokenizers`") from error
        self._hf.encode_special_tokens = True  # means: a special token's name in a text is encoded as any other text
        self._hf.no_truncation()  # a tokenizer.json can still hold the lengths of its training run
        self._hf.no_padding()
        self._added_text = {i: "" if token.special else token.content  # what decode makes of them
                            for i, token in self._hf.get_added_tokens_decoder().items()}
        self.vocab_size = 1 + max(self._hf.get_vocab(with_added_tokens=True).values())  # the embedding may have more rows
        self._read_decoder(file)
        self._read_config(file.parent)

    def _read_decoder(self, file: Path):
        """How this vocabulary writes bytes, and whether the first token's space is the tokenizer's own addition."""
        decoder = json.loads(self._hf.decoder.__getstate__()) if self._hf.decoder else {"type": "none"}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        self._byte_level = "ByteLevel" in steps
        if not self._byte_level and not {"Metaspace", "ByteFallback"} & set(steps):
            raise TokenizerError(f"expected a decoder of type ByteLevel, Metaspace or ByteFallback in {file}, "
                                 f"got {', '.join(steps)}: this engine runs Llama-like models only")
        # Llama 2 reads "Hi" as "▁Hi"; the way back takes one space off the start of the text.
        self.drops_first_space = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"

    def _read_config(self, folder: Path):
        """The chat template's text ("" if there is none), the layout it describes, the name of the BOS token."""
        file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template") or ""
            if isinstance(template, list):  # several, by name
                template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
            if not isinstance(template, str):
                raise ValueError(f"the chat_template is {template!r:.40}")
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or other than expected
            raise TokenizerError(f"cannot read {file} or {template_file.name} ({error}): download it again") from error
        self._template = template
        self._layout = next((layout for layout in (LLAMA_3, CHATML) if layout[0] in template
                             and all(self.token_id(name) is not None for name in layout)), ())
        bos = config.get("bos_token") or ""
        self._bos_token = bos["content"] if isinstance(bos, dict) else bos

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` knows the model's layout. A base model has none: send it raw text."""
        return self._layout != ()

    def token_id(self, name: str) -> int | None:
        """The id of the token written `name`, None if there is no such token."""
        return self._hf.token_to_id(name)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of a text. `add_bos` puts before it what the model's tokenizer.json does: Llama's BOS, nothing for SmolLM2."""
        try:
            return self._hf.encode(text, add_special_tokens=add_bos).ids
        except TypeError as error:  # not a str, or half of a surrogate pair, as JSON's "\ud83e" gives
            raise TokenizerError(f"expected a str of valid Unicode to encode, got {ascii(text):.80}") from error

    @lru_cache(maxsize=None)
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: none for special tokens, and for ids past the vocabulary (padded logits)."""
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        token = self._hf.id_to_token(token_id) or ""
        if self._byte_level and BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[char] for char in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def decode(self, ids) -> str:
        """Text of the ids, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    # -----------------------------------------------------------------------------------------------------------------
    # Chat prompts
    #
    # A chat is one text in which special tokens separate the turns; it ends where the assistant's answer begins, and the
    # model continues it. Special tokens are inserted by id and the texts between them encoded one by one: these are the
    # ids of the whole rendered prompt, since no merge crosses a special token. Not handled: tools, images, other layouts.
    # -----------------------------------------------------------------------------------------------------------------
    def chat(self, messages: list[dict], today: date | None = None) -> list[int]:
        """Ids of the prompt for [{"role": "user", "content": "Hi"}, ...], up to where the assistant's answer starts. `today`
        is the date in the system prompt of Llama 3.1 and later; default: what the model's template says."""
        if not self.has_chat_template:
            raise TokenizerError("expected a model with a Llama 3 or ChatML chat template, found none: send raw text")
        if not messages:
            raise TokenizerError("expected at least one message, got none")
        for message in messages:
            if not (isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)):
                raise TokenizerError(f"expected messages with a role ({', '.join(ROLES)}) and a content that is a str, "
                                     f"got {message!r:.100}")
        turns = [(message["role"], message["content"]) for message in messages]
        parts = self._llama3(turns, today) if self._layout == LLAMA_3 else self._chatml(turns)
        # An int is a token, a str is text. Nothing that a user sends is an int, so nobody can forge a token.
        return [i for part in parts for i in ([part] if isinstance(part, int) else self.encode(part, add_bos=False))]

    def _llama3(self, turns, today) -> list[int | str]:
        """A turn is <|start_header_id|>role<|end_header_id|>, a blank line, the trimmed content, <|eot_id|>. From 3.1 on
        there always is a system turn, which opens with two dates."""
        start, end, eot, begin = map(self.token_id, LLAMA_3)
        turns = [(role, content.strip()) for role, content in turns]
        if "Cutting Knowledge Date" in self._template:
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            if today is None:  # 3.2 asks for the day's date, 3.1 and 3.3 hold a fixed one
                today = date.today() if "strftime_now" in self._template else LLAMA_31_DATE
            day = f"{today.day:02} {MONTHS[today.month - 1]} {today.year}"
            turns.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n{system}"))
        # Blank line and content are one text: a tokenizer may put the two newlines and what follows into one token.
        parts = [part for role, content in turns for part in (start, role, end, "\n\n" + content, eot)]
        return [begin, *parts, start, "assistant", end, "\n\n"]

    def _chatml(self, turns) -> list[int | str]:
        """A turn is <|im_start|>role, a newline, the content as it is, <|im_end|>, a newline."""
        start, end = map(self.token_id, CHATML)
        # SmolLM2 and Qwen 2 bring a system prompt for chats that have none: one string literal between the two tokens.
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{<]+)<\|im_end\|>", self._template)
        if default and turns[0][0] != "system":
            turns = [("system", default[1]), *turns]
        bos = [self.token_id(self._bos_token)] if self._bos_token and "bos_token" in self._template else []
        parts = [part for role, content in turns for part in (start, f"{role}\n{content}", end, "\n")]
        return [*bos, *parts, start, "assistant\n"]


class StreamDecoder:
    """Text of tokens that arrive one by one: `push` each and print what it returns, `flush` at the end.

    A character is shown when its last byte is there; bytes that can no longer become one, as U+FFFD at once. The state is at
    most three bytes, so a token costs the same at any length (vLLM decodes a short window of tokens twice and compares).
    `Tokenizer.decode` runs this code too: a streamed answer and a whole one cannot differ.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often "" within an emoji."""
        data = self._tokenizer.token_bytes(token_id)
        if self._drop_space and data:  # only the first byte of the text is the space that the tokenizer added
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was cut off, else ""."""
        return self._utf8.decode(b"", final=True)
