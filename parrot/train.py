"""How Parrot was made: python parrot/train.py   (a few minutes on one GPU)

Needs PyTorch and Transformers; no other file of this project does.

Parrot is a Llama of 1.2 million parameters that recites texts.json without one wrong token. A
question goes in, in Llama 3's chat format; its exact answer comes out, then <|eot_id|>. Every other
question gets the first text's answer, "I am a parrot". A mistake in an engine that runs Parrot
(RoPE, masks, pages, batching) garbles the text, so everybody can see the mistake. For a fair test,
rounding must never change a token. Hence the margin in the loss: at every position the right
token's logit must lead the second-best logit by a good distance.

  texts.json            [{"questions": [the wordings], "answer": [the lines]}]; the first text is
                        also the answer to any unknown question
  other_questions.json  examples of unknown questions: templates and words to fill them, plain
                        questions, system prompts; the questions under "unseen" are never trained on

The program writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
model.safetensors beside itself, reads them back with Transformers in bfloat16, and prints figures.
--check only reads them back and prints the figures.
"""
import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).parent

VOCAB = 2048
HIDDEN = 128
FFN = 384
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 64
MAX_LENGTH = 4096                       # tokens of a conversation; the longest text has half
BATCH_TOKENS = 32768                    # padded tokens of one training step
MARGIN = 6.0                            # the logit lead that the loss asks for
LEAST_MARGIN = 1.0                      # the logit lead that the saved weights must keep everywhere
LONG_TEXT = 600                         # characters
LEAST_UNSEEN = 95                       # of the 100 unseen questions must get "I am a parrot"

# Llama 3's special tokens and pattern. The pattern cuts a text into pieces; BPE merges only within
# a piece.
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eom_id|>", "<|eot_id|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def fail(message):
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# The texts
# --------------------------------------------------------------------------------------------------
def key(question):
    """A question as a hurried user types: one key for "What is RoPE?" and "what is rope"."""
    return re.sub(r"[^\w\s+*/<>=-]", "", question.lower()).strip()


def read_texts(path):
    """texts.json as a list of (wordings, answer). Fails if one question has two answers."""
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    texts = [(entry["questions"], "\n".join(entry["answer"])) for entry in entries]
    answer_of = {}                      # key of a question -> its answer
    for wordings, answer in texts:
        for question in wordings:
            other = answer_of.setdefault(key(question), answer)
            if other != answer:
                fail(f"the question {question!r} has two answers in {path}: {other[:40]!r}... and "
                     f"{answer[:40]!r}...; keep one of them")
    return texts


def all_wordings(texts):
    """(question, answer) for each wording of each text."""
    return [(question, answer) for wordings, answer in texts for question in wordings]


def check_tokens(texts, tokenizer, vocab_size):
    """Fails on a text that the model could not read or say. Each token must be in the vocabulary, no
    token may be a special token, and decoding must give the text back."""
    for wordings, answer in texts:
        for text in [*wordings, answer]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            for i in ids:
                token = tokenizer.id_to_token(i)
                if i >= vocab_size or token in SPECIAL:
                    fail(f"the text {text[:60]!r} has the token {token!r} (id {i}), expected one of the "
                         f"{vocab_size} tokens of plain text that the model has")
            decoded = tokenizer.decode(ids)
            if decoded != text:
                fail(f"the text {text[:60]!r} does not survive the tokenizer: it comes back as "
                     f"{decoded[:60]!r}")


def make_tokenizer(texts, others):
    """A byte-level BPE in Llama 3's manner: all 256 bytes, then merges learned on the texts, then the
    special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [text for wordings, answer in texts for text in [*wordings, answer]]
    corpus += others["plain"] + others["templates"]
    for words in others["words"].values():
        corpus += words
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
    corpus += others["system"] + 20 * ["system", "user", "assistant", dates]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


# --------------------------------------------------------------------------------------------------
# The conversations
# --------------------------------------------------------------------------------------------------
def render(turns, system=None):
    """[(question, answer), ...] in Llama 3's chat format. A last answer of "" leaves the last turn
    open for the assistant."""
    def block(role, content):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"

    text = "<|begin_of_text|>"
    if system:
        text += block("system", system)
    for question, answer in turns:
        text += block("user", question)
        if answer:
            text += block("assistant", answer)
        else:
            text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return text


def date_lines(rng):
    """The two lines that Llama 3.2's own template puts before the system prompt, for any day."""
    month = rng.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
    day = rng.randint(1, 28)
    year = rng.randint(23, 39)
    return f"Cutting Knowledge Date: December 2023\nToday Date: {day:02d} {month} 20{year}\n\n"


class Conversations:
    """Draws training conversations: every wording of every text, under many system prompts, and as
    many questions whose answer is "I am a parrot"."""

    def __init__(self, texts, others, tokenizer, rng):
        self.texts = texts
        self.others = others
        self.tokenizer = tokenizer
        self.rng = rng
        self.parrot = texts[0][1]       # "I am a parrot ..."
        self.known = all_wordings(texts)
        self.short = [(question, answer) for question, answer in self.known if len(answer) < LONG_TEXT]
        known_questions = [question for question, _ in self.known]
        self.never = {key(question) for question in known_questions + others["unseen"]}
        sentences = [answer for _, answer in texts] + others["plain"]
        self.all_words = sorted({word for sentence in sentences for word in sentence.split()})

    def other_question(self):
        """A question that is in no text: a filled template, a plain question, words in any order, or
        characters in any order."""
        rng = self.rng
        words_for = self.others["words"]                # name of a slot -> words to fill the slot
        question = ""
        while not question or key(question) in self.never:
            kind = rng.random()
            if kind < 0.65:
                template = rng.choice(self.others["templates"])
                question = re.sub(r"{(\w+)}", lambda slot: rng.choice(words_for[slot[1]]), template)
            elif kind < 0.8:
                question = rng.choice(self.others["plain"])
            elif kind < 0.95:
                words = rng.choices(self.all_words, k=rng.randint(1, 12))
                question = " ".join(words) + rng.choice(["", "?", ".", "!"])
            else:
                question = "".join(self.any_character() for _ in range(rng.randint(3, 30))).strip()
        return question

    def any_character(self):
        """A lower-case letter, printable ASCII, or Latin with accents, each as likely."""
        rng = self.rng
        return chr(rng.choice([rng.randint(97, 122), rng.randint(32, 126), rng.randint(0xC0, 0x17F)]))

    def system(self):
        """A system prompt or None: known or random words, with or without Llama 3.2's date lines."""
        rng = self.rng
        text = None
        if rng.random() < 0.5:
            if rng.random() < 0.6:
                text = rng.choice(self.others["system"])
            else:
                text = " ".join(rng.choices(self.all_words, k=rng.randint(2, 25)))
        if rng.random() < 0.4:
            return date_lines(rng) + (text or "")
        return text

    def hurried(self, question):
        """The question as typed, or without capitals, or without the punctuation at the end."""
        if self.rng.random() < 0.2:
            question = question.lower()
        if self.rng.random() < 0.2:
            question = question.rstrip("?.!")
        return question

    def more_turns(self, count):
        """Whether a conversation of `count` turns gets another turn. Most have a single turn; the rest
        have several, seldom more than 12."""
        if self.rng.random() < 0.15:
            return True
        return 1 < count < 12 and self.rng.random() < 0.7

    def example(self, question, answer):
        """(prompt ids, answer ids with <|eot_id|>); earlier turns stand before some questions."""
        turns = [(self.hurried(question), "")]
        while self.more_turns(len(turns)):
            if self.rng.random() < 0.7:
                turns.insert(0, self.rng.choice(self.short))
            else:
                turns.insert(0, (self.other_question(), self.parrot))
        return self.encode(render(turns, self.system())), self.encode(answer + "<|eot_id|>")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def epoch(self):
        """Batches of conversations of about the same length, each at most BATCH_TOKENS padded tokens.
        Half are wordings of the texts, half are other questions."""
        # Short texts come three times: a long text teaches more tokens at a time.
        known = self.known + 2 * self.short
        examples = [self.example(question, answer) for question, answer in known]
        examples += [self.example(self.other_question(), self.parrot) for _ in known]

        def length(example):
            prompt, answer = example
            return len(prompt) + len(answer)

        examples = [example for example in examples if length(example) <= MAX_LENGTH]
        # A random fraction shuffles examples of equal length.
        examples.sort(key=lambda example: length(example) + self.rng.random())
        batches = []
        batch = []
        for example in examples:
            if (len(batch) + 1) * length(example) > BATCH_TOKENS:
                batches.append(batch)
                batch = []
            batch.append(example)
        batches.append(batch)
        self.rng.shuffle(batches)
        return batches


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def make_config(tokenizer):
    """Llama-3.2-1B-Instruct's config.json, small. RoPE is scaled from 512 tokens to 4,096, so that the
    scaling matters well within a text."""
    eos_names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    rope_scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 512}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": [tokenizer.token_to_id(name) for name in eos_names]}


def lead(logits, targets):
    """[n, 1]: each target's logit minus the highest other logit. logits [n, V], targets [n, 1]."""
    right = logits.gather(1, targets)
    others = logits.scatter(1, targets, float("-inf")).amax(1, keepdim=True)
    return right - others


def loss_of(model, batch, device):
    """Cross-entropy plus the missing margin, over the answers' tokens."""
    import torch
    import torch.nn.functional as F
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -1)      # the next token; -1 where it does not count
    for row, (prompt, answer) in enumerate(batch):      # padding is right: attention never sees it
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1:end - 1] = torch.tensor(answer)
    ids = ids.to(device, non_blocking=True)
    targets = targets.to(device, non_blocking=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = targets >= 0
    logits = model.lm_head(hidden[counted]).float()     # [n, V] for the n counted positions
    targets = targets[counted]
    missing = F.relu(MARGIN - lead(logits, targets[:, None]))
    return F.cross_entropy(logits, targets) + missing.mean()


def train(folder, conversations, steps, seed):
    """Trains with bf16 products, so that the weights adapt to rounding, and saves bf16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    batches = []
    start = time.time()
    for step in range(steps):
        batches = batches or conversations.epoch()
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, batches.pop(), device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():9.5f}  {time.time() - start:5.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_model(folder, conversations, steps, seed):
    """Trains, and writes every file of the model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = conversations.tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    config = make_config(tokenizer)

    def write(name, value):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    write("config.json", config)
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"]})
    train(folder, conversations, steps, seed)
    # save_pretrained() overwrote config.json; ours has Llama 3.2's form, field by field.
    write("config.json", config)
    write("generation_config.json", {"do_sample": False, "bos_token_id": config["bos_token_id"],
                                     "eos_token_id": config["eos_token_id"]})


# --------------------------------------------------------------------------------------------------
# The figures
# --------------------------------------------------------------------------------------------------
def least_margin(model, prompts_and_answers, device):
    """The least lead of a right token over all positions of all answers (negative: greedy decoding
    errs), and the (prompt, answer) pairs that greedy decoding gets wrong."""
    import torch
    least = float("inf")
    wrong = []
    for prompt, answer in prompts_and_answers:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device=device)).logits
        logits = logits[0, len(prompt) - 1:-1].float()                  # [len(answer), V]
        target = torch.tensor(answer, device=device)[:, None]
        margin = lead(logits, target).min().item()
        least = min(least, margin)
        if not margin > 0:              # NaN is wrong too
            wrong.append((prompt, answer))
    return least, wrong


def answers_of(model, prompts, eos, device):
    """Greedy answers of Transformers' generate(), all prompts in one batch padded on the left."""
    import torch
    length = max(map(len, prompts))
    padding = [[0] * (length - len(prompt)) for prompt in prompts]
    ids = [zeros + prompt for zeros, prompt in zip(padding, prompts)]
    mask = [zeros + [1] * len(prompt) for zeros, prompt in zip(padding, prompts)]
    out = model.generate(torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                         do_sample=False, max_length=MAX_LENGTH, eos_token_id=eos, pad_token_id=eos[0])
    return [row[length:].tolist() for row in out]


def check_margins(model, conversations, device):
    """Prints how well the model knows every wording, under several system prompts. True if all
    margins are good enough."""
    encode = conversations.encode
    systems = {
        "no system prompt": None,
        "a system prompt": "You are a helpful assistant.",
        "one never seen": "You run a bakery in Graz.",
        "Llama 3.2's date lines": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"}
    good = True
    for name, system in systems.items():
        pairs = [(encode(render([(question, "")], system)), encode(answer + "<|eot_id|>"))
                 for question, answer in conversations.known]
        least, wrong = least_margin(model, pairs, device)
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        print(f"{name + ':':24} {len(pairs) - len(wrong)} of {len(pairs)} wordings exact, "
              f"least margin {least:.2f}, longest {longest} tokens")
        good &= least >= LEAST_MARGIN
        for prompt, _ in wrong[:5]:
            print("    wrong:", repr(conversations.tokenizer.decode(prompt)))
    return good


def check_answers(model, conversations, eos, device):
    """Prints how many texts generate() gives exactly, and how many unseen questions get "I am a
    parrot". True if both numbers are good enough."""
    encode = conversations.encode

    def say(questions):
        prompts = [encode(render([(question, "")])) for question in questions]
        return answers_of(model, prompts, eos, device)

    texts = conversations.texts
    exact = 0
    for ids, (_, answer) in zip(say([wordings[0] for wordings, _ in texts]), texts):
        expected = encode(answer + "<|eot_id|>")
        exact += ids[:len(expected)] == expected
    print(f"generate():              {exact} of {len(texts)} texts exact")

    unseen = conversations.others["unseen"]
    parrot = encode(conversations.parrot)
    missed = [question for ids, question in zip(say(unseen), unseen) if ids[:len(parrot)] != parrot]
    known = len(unseen) - len(missed)
    note = f"; not: {missed}" if missed else ""
    print(f"unseen questions:        {known} of {len(unseen)} answered \"I am a parrot\"{note}")
    return exact == len(texts) and known >= LEAST_UNSEEN


def check(folder, conversations):
    """Reads the saved folder back with Transformers in bf16 and prints the figures. True if the model
    knows enough."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    auto = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "You are a parrot."}, {"role": "user", "content": "Who are you?"}]
    rendered = auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == render([("Who are you?", "")], "You are a parrot."), rendered
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    has_margin = check_margins(model, conversations, device)
    has_answers = check_answers(model, conversations, eos, device)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    files = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    print(f"parameters:              {sum(p.numel() for p in model.parameters()):,}")
    print(f"bytes:                   {files}; together {sum(sizes.values()):,}")
    return has_margin and has_answers


def main():
    parser = argparse.ArgumentParser(description="Make Parrot, the bundled model, or check it.")
    parser.add_argument("--check", action="store_true", help="only check the model that is there")
    parser.add_argument("--texts", type=Path, default=FOLDER / "texts.json")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the model folder")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = read_texts(args.texts)
    others = json.loads((FOLDER / "other_questions.json").read_text(encoding="utf-8"))
    if args.check:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(texts, others)
    check_tokens(texts, tokenizer, VOCAB)
    conversations = Conversations(texts, others, tokenizer, random.Random(args.seed))
    if not args.check:
        write_model(args.out, conversations, args.steps, args.seed)
    sys.exit(0 if check(args.out, conversations) else 1)


if __name__ == "__main__":
    main()
