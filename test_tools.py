"""Tools: what openai's clients send and get, for both families of models, in a server.

The answers are scripts, or made by random weights under a grammar.
"""
import json
import shutil

import openai
import pytest

from reference import END, PARROT, write_model
from test_server import SlowStandIn, refusal, running, stub_llm, user
from tinyvllm import LLM, TinyVLLMError
from tokenizer import Tokenizer
from tools import Tools

# In the style of Llama 3.1's template: tools and calls as JSON, one call for a message.
TEMPLATE = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}[{{ m.role }}]
{%- if m.tool_calls %}{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})
{%- else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}[assistant]"""
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Tells the weather.", "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False, "$defs": {
            "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "properties": {"city": {"enum": ["Paris", "Zürich"]}, "days": {"$ref": "#/$defs/days"}}}}}
NOW = {"type": "function", "function": {"name": "now"}}
FLIP = {"type": "function", "function": {"name": "flip", "parameters": {
    "properties": {"up": {"type": "boolean"}}, "required": ["up"], "additionalProperties": False}}}
LLAMA, HERMES = FAMILIES = ["<|python_tag|>", "<tool_call>"]
CALL = {LLAMA: '{"name": "weather", "parameters": {"city": "Zürich", "days": 3}}',
        HERMES: '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>'}
ARGUMENTS = {"city": "Zürich", "days": 3}


def write_tokenizer(folder, mark):
    """Parrot's, with the mark in place of a token: as in the models, <tool_call> is no special token."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PARROT / name, folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    [token] = [token for token in data["added_tokens"] if token["content"] == "<|eom_id|>"]
    token |= {"content": mark, "special": mark == LLAMA}
    file.write_text(json.dumps(data), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(the family's mark, its tokenizer)"""
    return request.param, Tokenizer(write_tokenizer(tmp_path_factory.mktemp("family"), request.param))


def found(text, tokenizer):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in Tools([WEATHER, NOW], "auto", tokenizer).calls(text)]


def test_calls_in_a_text(family):
    mark, tokenizer = family
    call = CALL[mark]
    weather = ("weather", ARGUMENTS)
    assert found(call, tokenizer) == [weather]
    assert found(f" \n{call}\n", tokenizer) == [weather]
    other = call.replace("parameters", "arguments").replace("weather", "now")
    for separator in ("", "\n", *([";", "; "] if mark == LLAMA else [])):
        assert found(call + separator + other, tokenizer) == [weather, ("now", ARGUMENTS)]
    assert found(f"Let me see. {call}", tokenizer) == ([weather] if mark == HERMES else [])
    for text in ("", "Hello", "{", "{}", call[:-1] if mark == LLAMA else call[:-20], call + "x", call[1:],
                 call.replace("weather", "rm"), call.replace('{"city": "Zürich", "days": 3}', "5"),
                 call.replace('"name"', '"nome"'), call.replace('"weather"', '["weather"]'),
                 "[" * 5000, mark, f"[{call}]"[mark == HERMES:]):
        assert found(text, tokenizer) == [], text


def test_only_what_may_be_a_call_is_held_back(family):
    mark, tokenizer = family
    tools = Tools([WEATHER], "auto", tokenizer)
    call = CALL[mark]
    assert [tools.start(call[:n]) for n in range(1, len(call))] == [0] * (len(call) - 1)
    if mark == LLAMA:
        assert tools.start("") == tools.start(" \n") == 0 and tools.start("Hi {") == 4
    else:
        text = "1 < 2 <tool_calls>? " + call
        held = [n - tools.start(text[:n]) for n in range(len(text))]
        assert held[:6] == [0, 0, 0, 1, 0, 0] and tools.start(text[:16]) == 6
        assert tools.start("a <tool<tool_cal") == 7 and tools.start("a <tool_cam") == 11


@pytest.mark.parametrize("definitions, choice, word", [
    ([{"type": "function"}], "auto", "tools"), ("x", "auto", "tools"), ({}, "auto", "tools"),
    ([5], "auto", "tools"), ([{"type": "function", "function": {"name": "a b"}}], "auto", "tools"),
    ([{"type": "function", "function": {"name": "f", "parameters": 5}}], "auto", "tools"),
    (None, "required", "tools"), ([NOW], "always", "tool_choice"), ([NOW], 5, "tool_choice"),
    ([NOW], {"function": {"name": "weather"}}, "tool_choice")])
def test_bad_tools(family, definitions, choice, word):
    with pytest.raises(TinyVLLMError, match=f"^{word}: expected"):
        Tools(definitions, choice, family[1])


def test_a_model_of_no_family():
    with pytest.raises(TinyVLLMError, match="expected a model of the family"):
        Tools([NOW], "auto", Tokenizer(PARROT))


# --------------------------------------------------------------------------------------------------
# Through the server
# --------------------------------------------------------------------------------------------------
class Script(SlowStandIn):
    """A model that says what it is told, a token a step."""
    text = ()

    def launch(self, batch):
        _, get_tokens = super().launch(batch)
        for row, sequence in enumerate(batch.sampled):
            at = int(batch.lengths[row]) - sequence.num_prompt_tokens
            self.sampled[row] = self.text[at] if at < len(self.text) else END
        tokens, logprobs = get_tokens()
        tokens[:] = self.sampled
        return None, lambda: (tokens, logprobs)


@pytest.fixture(scope="module")
def scripted(family):
    """A server whose model has the family's vocabulary, and says what is in its `text`."""
    llm = stub_llm()
    llm.tokenizer = family[1]
    llm.engine.model.__class__ = Script
    with running(llm) as it:
        yield it


def say(scripted, text):
    scripted.llm.engine.model.text = scripted.llm.tokenizer.encode(text, add_bos=False)


def ask(scripted, **options):
    """(message, finish reason) of a whole answer, which a stream gives too."""
    asked = {"model": "model", "messages": user("Weather?"), "tools": [WEATHER, NOW], **options}
    client = scripted.client()
    choice = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == choice.finish_reason
    assert (streamed.message.content or "").strip() == (choice.message.content or "").strip()

    def functions(message):
        return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    assert functions(streamed.message) == functions(choice.message)
    return choice.message, choice.finish_reason


def test_answers_with_calls(scripted, family):
    mark, _ = family
    say(scripted, CALL[mark])
    message, reason = ask(scripted)
    [call] = message.tool_calls
    assert reason == "tool_calls" and message.content is None
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    say(scripted, CALL[mark] + "\n" + CALL[mark])
    message, _ = ask(scripted)
    assert len({call.id for call in message.tool_calls}) == 2
    message, reason = ask(scripted, parallel_tool_calls=False)
    assert (len(message.tool_calls), reason) == (1, "tool_calls")
    cut = scripted.client().chat.completions.create(
        model="model", messages=user("Hi"), tools=[WEATHER], logprobs=True, max_tokens=5).choices[0]
    assert cut.finish_reason == "length" and not cut.message.tool_calls
    assert CALL[mark].startswith(cut.message.content) and len(cut.logprobs.content) == 5


def test_answers_without_calls(scripted, family):
    mark, _ = family
    unknown = CALL[mark].replace("weather", "rm")
    for text in "The weather is <fine>.", '{"a": 1}', "a <tool_call> b", unknown:
        say(scripted, text)
        assert ask(scripted)[0].content == text
        assert ask(scripted)[1] == "stop"
    say(scripted, CALL[mark])
    for options in {"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}, {"tools": []}:
        message, reason = ask(scripted, **options)
        assert (message.content, message.tool_calls, reason) == (CALL[mark], None, "stop")
    if mark == HERMES:
        say(scripted, "I look. " + CALL[mark])
        message, reason = ask(scripted)
        assert (message.content, len(message.tool_calls), reason) == ("I look.", 1, "tool_calls")


def test_what_the_template_gets(scripted, family):
    """Tools and earlier calls, whose arguments are an object again; results of tools."""
    _, tokenizer = family
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    messages = [*user("Hi"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    say(scripted, "Fine.")
    client = scripted.client()
    answer = client.chat.completions.create(model="model", messages=messages, tools=[WEATHER])
    _, _, data = scripted.post("/tokenize", {"messages": messages, "tools": [WEATHER]})
    ids = json.loads(data)["tokens"]
    assert answer.usage.prompt_tokens == len(ids)
    tools = json.dumps([WEATHER], ensure_ascii=False)
    assert tokenizer.decode(ids) == (
        f'{tools}[user]Hi[assistant]weather({{"city": "Rom"}})[tool]sunny[assistant]')
    call["function"]["arguments"] = "{"
    error = refusal(scripted, "/v1/chat/completions", {"messages": messages})
    assert error["param"] == "messages" and "tool_calls" in error["message"]


@pytest.mark.parametrize("param, body", [
    ("tools", {"tools": [5]}), ("tools", {"tool_choice": "required"}),
    ("tool_choice", {"tools": [NOW], "tool_choice": "x"}),
    ("tool_choice", {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
    ("response_format", {"tools": [NOW], "response_format": {"type": "json_object"}})])
def test_bad_fields(scripted, param, body):
    assert refusal(scripted, "/v1/chat/completions", {"messages": user("Hi")} | body)["param"] == param


@pytest.mark.parametrize("mark", FAMILIES)
def test_required_calls(tmp_path, mark):
    """Random weights call a tool whenever they must, and the tool that they must."""
    pytest.importorskip("llguidance")
    folder = write_model(tmp_path / "model", {"max_position_embeddings": 1024})
    write_tokenizer(folder, mark)
    with running(LLM(folder)) as it:
        names = set()
        for seed in range(6):
            choice = "required" if seed < 4 else {"type": "function", "function": {"name": "weather"}}
            message, reason = ask(it, tools=[WEATHER, FLIP], tool_choice=choice, temperature=2.0, seed=seed)
            [call] = message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert reason == "tool_calls" and message.content is None
            if call.function.name == "weather":
                assert arguments["city"] in ("Paris", "Zürich") and 1 <= arguments["days"] <= 9
            else:
                assert list(arguments) == ["up"] and type(arguments["up"]) is bool
            names.add(call.function.name)
        assert call.function.name == "weather" and names == {"weather", "flip"}
        wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}
        error = refusal(it, "/v1/chat/completions", {
            "messages": user("Hi"), "tools": [wrong], "tool_choice": "required"})
        assert error["param"] == "tools" and "Invalid type: foo" in error["message"]
