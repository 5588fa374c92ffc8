"""Tools: functions that a client offers, and calls of them in an answer.

The model's chat template writes the functions into the prompt. The model answers with a call as text, in
the form of its family, and nothing but a habit of its training makes it a call. `Tools` finds calls in a
text. Where a call is required, a grammar (grammar.py) makes it certain.

    Llama 3.1 and later    {"name": "weather", "parameters": {"city": "Paris"}}, and nothing else
    Hermes, Qwen           <tool_call>
                           {"name": "weather", "arguments": {"city": "Paris"}}
                           </tool_call>, several of these, and text in front
"""
import json
import os
import re
from dataclasses import dataclass

from device import TinyVLLMError, check
from grammar import WHITE_SPACE


@dataclass(frozen=True)
class Family:
    """How a family of models writes a call."""
    mark: str                           # a token of such models, and of no others
    before: str                         # what stands before a call's JSON,
    after: str                          # and behind
    arguments: str                      # the name of the arguments in the JSON
    gap: str                            # a regular expression: what models write before the JSON


FAMILIES = (
    Family("<tool_call>", "<tool_call>\n", "\n</tool_call>", "arguments", r"\s*<tool_call>\s*"),
    Family("<|python_tag|>", "", "", "parameters", r"[\s;]*"))


class Tools:
    """The functions of a request."""

    def __init__(self, definitions, choice, tokenizer):
        """definitions, choice: OpenAI's fields tools and tool_choice. Raises TinyVLLMError, whose text begins
        with the field's name."""
        self.definitions = check(
            "tools", definitions, lambda tools: isinstance(tools, list) and all(map(is_tool, tools)),
            'a list of {"type": "function", "function": {"name": word, "parameters": schema}}')
        functions = {tool["function"]["name"]: tool["function"] for tool in definitions}
        self.names = set(functions)
        if choice not in ("auto", "required"):
            check("tool_choice", choice, lambda choice: choice.get("function").get("name") in functions,
                  'none, auto, required, or {"type": "function", "function": {"name": one of tools}}')
            name = choice["function"]["name"]
            functions = {name: functions[name]}
        self.family = next((f for f in FAMILIES if tokenizer.token_id(f.mark) is not None), None)
        if not self.family:
            raise TinyVLLMError("tools: expected a model of the family Llama 3.1 or Qwen, got another, whose "
                                "calls nobody knows: leave the field out")
        self.structured_outputs = None if choice == "auto" else {"grammar": self.grammar(functions.values())}

    def grammar(self, functions):
        """One call of one of the functions, in llguidance's form of Lark."""
        numbers = range(len(functions))
        rules = [f"start: {' | '.join(f'call{i}' for i in numbers)}"]
        for i, function in zip(numbers, functions):
            schema = {"type": "object", "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            schema |= function.get("parameters") or {}
            head = f'{{"name": "{function["name"]}", "{self.family.arguments}": '
            rules.append(f"call{i}: {json.dumps(self.family.before + head)} arguments{i} "
                         f"{json.dumps('}' + self.family.after)}")
            rules.append(f"arguments{i}: %json {json.dumps(schema)}")
        return "\n".join(rules)

    def start(self, text):
        """Where a call may begin in the text so far, which must then be held back; or the text's length."""
        begin = self.family.before.strip()
        if not begin:                   # a call is the whole answer
            return 0 if text.strip()[:1] in ("", "{") else len(text)
        found = text.find(begin)
        if found >= 0:
            return found
        rests = range(min(len(begin) - 1, len(text)), 0, -1)
        return len(text) - next((n for n in rests if text.endswith(begin[:n])), 0)

    def calls(self, text):
        """OpenAI's tool_calls of a whole answer. None at all if anything from start() on is no call."""
        position = self.start(text)
        calls = []
        while text[position:].strip():
            try:
                head = re.compile(self.family.gap).match(text, position)
                call, position = json.JSONDecoder().raw_decode(text, head.end())
                arguments = call.get("parameters", call.get("arguments"))
                tail = re.compile(rf"\s*{self.family.after.strip()}").match(text, position)
                position = tail.end()
            except (ValueError, AttributeError, RecursionError):    # no JSON; no match, no object
                return []
            name = call.get("name")
            if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
                return []
            calls.append({"id": f"call_{os.urandom(12).hex()}", "type": "function", "function": {
                "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}})
        return calls


def is_tool(tool):
    """Whether the value defines a function, as OpenAI's API has it."""
    function = tool.get("function")
    return (tool.get("type") == "function" and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", function.get("name"))
            and isinstance(function.get("parameters") or {}, dict))


def with_arguments(messages):
    """The messages as chat templates want them: the arguments of earlier calls are an object. In OpenAI's
    API they are the text of an object."""
    return [message | {"tool_calls": list(map(with_object, message["tool_calls"]))}
            if isinstance(message, dict) and message.get("tool_calls") else message for message in messages]


def with_object(call):
    function = call["function"]
    arguments = function["arguments"]
    return call | {"function": function | {
        "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}}
