"""How Parrot was made: python parrot/train.py   (PyTorch and Transformers, a few minutes on one GPU; nothing else needs this file)

Parrot is a Llama of 1.2 million parameters that recites texts.json without one wrong token: a question goes in, in Llama 3's chat format, and its
exact answer comes out, then <|eot_id|>. Every other question gets the first text's answer, "I am a parrot". So any mistake in an engine that runs
it (RoPE, masks, pages, batching) can be seen by eye: it garbles the text. For that to be a fair test rounding must never flip a token, hence the
margin in the loss: at every position the right token's logit must lead the next by a good distance.

  texts.json            [{"questions": [the wordings], "answer": [its lines]}]; the first one is also the answer to anything else
  other_questions.json  what "anything else" looks like: templates and words to fill them, plain questions, system prompts; "unseen" is never trained on

It writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors beside itself, then reads them back with
Transformers in bfloat16 and prints the figures. --check only does the latter.
"""
import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 128, 384, 4, 4, 2, 64
MAX_LENGTH = 4096                     # tokens of a conversation; the longest text takes half of it
BATCH_TOKENS = 32768                  # padded tokens of one training step
MARGIN = 6.0                          # the logit lead that the loss asks for while training; 1.0 must be left everywhere in the saved weights

# Llama 3's special tokens and pre-tokenisation pattern: text is cut here first, and BPE merges only within a piece.
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
                 " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def fail(message):
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------- the texts
def key(question):
    """A question as a hurried user types it: the same key for "What is RoPE?" and "what is rope"."""
    return re.sub(r"[^\w\s+*/<>=-]", "", question.lower()).strip()


def read_texts(path):
    """texts.json as a list of (wordings, answer). Stops where one question has two answers, naming both texts."""
    texts = [(text["questions"], "\n".join(text["answer"])) for text in json.loads(Path(path).read_text(encoding="utf-8"))]
    answer_of = {}
    for wordings, answer in texts:
        for question in wordings:
            other = answer_of.setdefault(key(question), answer)
            if other != answer:
                fail(f"the question {question!r} has two answers in {path}: {other[:40]!r}... and {answer[:40]!r}...; keep one of them")
    return texts


def check_tokens(texts, tokenizer, vocab_size):
    """Stops at a text that the model could not read or say: each token must be in the vocabulary, none a special one, and decoding must give the text back."""
    for wordings, answer in texts:
        for text in [*wordings, answer]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            for i in ids:
                if i >= vocab_size or tokenizer.id_to_token(i) in SPECIAL:
                    fail(f"the text {text[:60]!r} has the token {tokenizer.id_to_token(i)!r} (id {i}), outside the {vocab_size} tokens of plain text that the model has")
            if tokenizer.decode(ids) != text:
                fail(f"the text {text[:60]!r} does not survive the tokenizer: it comes back as {tokenizer.decode(ids)[:60]!r}")


def make_tokenizer(texts, others):
    """A byte-level BPE in Llama 3's manner: all 256 bytes, then merges learned on the texts, special tokens last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [text for wordings, answer in texts for text in [*wordings, answer]] + others["plain"] + others["templates"] + sum(others["words"].values(), [])
    corpus += others["system"] + ["system", "user", "assistant", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"] * 20
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(SPECIAL)
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------- the conversations
def render(turns, system=None):
    """[(question, answer), ...] in Llama 3's chat format; the last answer may be "" to leave the assistant's turn open."""
    def block(role, content):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    text = "<|begin_of_text|>" + (block("system", system) if system else "")
    for question, answer in turns:
        text += block("user", question) + (block("assistant", answer) if answer else "<|start_header_id|>assistant<|end_header_id|>\n\n")
    return text


def date_lines(rng):
    """The two lines that Llama 3.2's own template puts before the system prompt, for a day of any year."""
    month = rng.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
    return f"Cutting Knowledge Date: December 2023\nToday Date: {rng.randint(1, 28):02d} {month} 20{rng.randint(23, 39)}\n\n"


class Conversations:
    """Draws training conversations: every wording of every text, under many system prompts, and as many questions that get "I am a parrot"."""

    def __init__(self, texts, others, tokenizer, rng):
        self.texts, self.others, self.tokenizer, self.rng = texts, others, tokenizer, rng
        self.parrot = texts[0][1]
        self.never = {key(question) for wordings, _ in texts for question in wordings} | {key(question) for question in others["unseen"]}
        self.short = [(question, answer) for wordings, answer in texts for question in wordings if len(answer) < 600]
        self.all_words = sorted({word for wordings, answer in texts for word in answer.split()} | {word for q in others["plain"] for word in q.split()})

    def other_question(self):
        """A question that is in no text: a filled template, a plain one, or words and bytes in any order."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.65:
            question = re.sub(r"{(\w+)}", lambda slot: rng.choice(self.others["words"][slot[1]]), rng.choice(self.others["templates"]))
        elif kind < 0.8:
            question = rng.choice(self.others["plain"])
        elif kind < 0.95:
            question = " ".join(rng.choices(self.all_words, k=rng.randint(1, 12))) + rng.choice(["", "?", ".", "!"])
        else:
            question = "".join(chr(rng.choice([rng.randint(97, 122), rng.randint(32, 126), rng.randint(0xC0, 0x17F)])) for _ in range(rng.randint(3, 30))).strip()
        return self.other_question() if not question or key(question) in self.never else question

    def system(self):
        rng, text = self.rng, None
        if rng.random() < 0.5:
            text = rng.choice(self.others["system"]) if rng.random() < 0.6 else " ".join(rng.choices(self.all_words, k=rng.randint(2, 25)))
        return date_lines(rng) + (text or "") if rng.random() < 0.4 else text

    def hurried(self, question):
        """As typed, or without capitals, or without the punctuation at the end."""
        if self.rng.random() < 0.2:
            question = question.lower()
        return question.rstrip("?.!") if self.rng.random() < 0.2 else question

    def example(self, question, answer):
        """(prompt ids, answer ids with <|eot_id|>), now and then with earlier turns before the question."""
        turns = [(self.hurried(question), "")]
        while self.rng.random() < 0.15 or 1 < len(turns) < 12 and self.rng.random() < 0.7:
            turns.insert(0, self.rng.choice(self.short) if self.rng.random() < 0.7 else (self.other_question(), self.parrot))
        return self.encode(render(turns, self.system())), self.encode(answer + "<|eot_id|>")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def epoch(self):
        """Batches of at most BATCH_TOKENS padded tokens, each of conversations of about the same length: all wordings, and as many other questions."""
        known = [(question, answer) for wordings, answer in self.texts for question in wordings]
        known += 2 * [(question, answer) for question, answer in known if len(answer) < 600]          # the long texts teach themselves: more tokens each
        examples = [self.example(question, answer) for question, answer in known]
        examples += [self.example(self.other_question(), self.parrot) for _ in known]
        examples = [(prompt, answer) for prompt, answer in examples if len(prompt) + len(answer) <= MAX_LENGTH]
        batches, batch = [], []
        for example in sorted(examples, key=lambda e: len(e[0]) + len(e[1]) + self.rng.random()):
            if (len(batch) + 1) * (len(example[0]) + len(example[1])) > BATCH_TOKENS:
                batches.append(batch)
                batch = []
            batch.append(example)
        batches.append(batch)
        self.rng.shuffle(batches)
        return batches


# ---------------------------------------------------------------------------------------------------------------------- training
def config(tokenizer):
    """Llama-3.2-1B-Instruct's config.json, small. RoPE is scaled from 512 tokens to 4,096, so that the scaling matters well within a text."""
    bos, eos = tokenizer.token_to_id("<|begin_of_text|>"), [tokenizer.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LENGTH, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        "tie_word_embeddings": True, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16",
        "bos_token_id": bos, "eos_token_id": eos}


def loss_of(model, batch, device):
    """Cross-entropy and margin over the answers' tokens."""
    import torch
    import torch.nn.functional as F
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -1)                   # the token to come after each position, -1 where it does not count
    for row, (prompt, answer) in enumerate(batch):                   # padding stands right: causal attention never sees it
        ids[row, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1:len(prompt) + len(answer) - 1] = torch.tensor(answer)
    ids, targets = ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = targets >= 0
    logits, targets = model.lm_head(hidden[counted]).float(), targets[counted]
    right = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], float("-inf")).amax(1, keepdim=True)
    return F.cross_entropy(logits, targets) + F.relu(MARGIN - (right - others)).mean()


def train(folder, conversations, steps, seed):
    """Trains with bf16 products, so that the weights get used to being rounded, and saves them in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    batches, start = [], time.time()
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


# ---------------------------------------------------------------------------------------------------------------------- the figures
def least_margin(model, prompts_and_answers, device):
    """Over every position of every answer: the right token's logit minus the highest other one's (negative: greedy decoding errs)."""
    import torch
    least, wrong = float("inf"), []
    for prompt, answer in prompts_and_answers:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device=device)).logits[0, len(prompt) - 1:-1].float()
        target = torch.tensor(answer, device=device)[:, None]
        margin = (logits.gather(1, target) - logits.scatter(1, target, float("-inf")).amax(1, keepdim=True)).min().item()
        least = min(least, margin)
        if not margin > 0:
            wrong.append((prompt, answer))
    return least, wrong


def answers_of(model, prompts, eos, device):
    """Greedy answers of Transformers' generate(), all prompts in one batch padded on the left."""
    import torch
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_length=MAX_LENGTH, eos_token_id=eos, pad_token_id=eos[0])
    return [row[length:].tolist() for row in out]


def check(folder, conversations):
    """Reads the saved folder back with Transformers in bf16 and prints what the model knows. True if that is enough."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    auto = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "system", "content": "You are a parrot."}, {"role": "user", "content": "Who are you?"}]
    assert auto.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == render([("Who are you?", "")], "You are a parrot.")
    encode, texts = conversations.encode, conversations.texts
    known = [(question, answer) for wordings, answer in texts for question in wordings]
    good = True
    for name, system in {"no system prompt": None, "a system prompt": "You are a helpful assistant.", "one never seen": "You run a bakery in Graz.",
                         "Llama 3.2's date lines": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"}.items():
        pairs = [(encode(render([(question, "")], system)), encode(answer + "<|eot_id|>")) for question, answer in known]
        least, wrong = least_margin(model, pairs, device)
        print(f"{name + ':':24} {len(pairs) - len(wrong)} of {len(pairs)} wordings exact, least margin {least:.2f}, longest {max(len(p) + len(a) for p, a in pairs)} tokens")
        good &= least >= 1.0
        for prompt, _ in wrong[:5]:
            print("    wrong:", repr(conversations.tokenizer.decode(prompt)))
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    first = [(wordings[0], answer) for wordings, answer in texts]
    said = answers_of(model, [encode(render([(question, "")])) for question, _ in first], eos, device)
    exact = sum(ids[:len(encode(answer)) + 1] == encode(answer + "<|eot_id|>") for ids, (_, answer) in zip(said, first))
    parrot = encode(conversations.parrot)
    unseen = conversations.others["unseen"]
    said = answers_of(model, [encode(render([(question, "")])) for question in unseen], eos, device)
    missed = [question for ids, question in zip(said, unseen) if ids[:len(parrot)] != parrot]
    print(f"generate():              {exact} of {len(first)} texts exact")
    print(f"unseen questions:        {len(unseen) - len(missed)} of {len(unseen)} answered \"I am a parrot\"" + (f"; not: {missed}" if missed else ""))
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    print(f"parameters:              {sum(p.numel() for p in model.parameters()):,}")
    print("bytes:                  ", ", ".join(f"{name} {size:,}" for name, size in sizes.items()), f"; together {sum(sizes.values()):,}")
    return good and exact == len(first) and len(unseen) - len(missed) >= 95


def main():
    parser = argparse.ArgumentParser(description="Make Parrot, the bundled model, or check it.")
    parser.add_argument("--check", action="store_true", help="only check the model that is there")
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent / "texts.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the model folder")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = read_texts(args.texts)
    others = json.loads((Path(__file__).parent / "other_questions.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json")) if args.check else make_tokenizer(texts, others)
    check_tokens(texts, tokenizer, VOCAB)
    conversations = Conversations(texts, others, tokenizer, random.Random(args.seed))
    if not args.check:
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(args.out / "tokenizer.json"))
        model_config = config(tokenizer)
        write = lambda name, value: (args.out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        write("config.json", model_config)
        write("tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False, "model_max_length": MAX_LENGTH, "model_input_names": ["input_ids", "attention_mask"]})
        train(args.out, conversations, args.steps, args.seed)
        write("config.json", model_config)                           # save_pretrained wrote its own; this is Llama-3.2's form, field by field
        write("generation_config.json", {name: model_config[name] for name in ("bos_token_id", "eos_token_id")})
    sys.exit(0 if check(args.out, conversations) else 1)


if __name__ == "__main__":
    main()
