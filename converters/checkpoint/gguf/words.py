"""How BPE tokenizers split a text into words before they merge, by `tokenizer.ggml.pre`.

The names, and which of them share a rule, are those of llama.cpp (llama-vocab.cpp, `load`); the
rules are those of the tokenizer.json files that the names were made for, which llama-vocab.cpp
quotes where its own regular expressions only come near them ("original regex from tokenizer.json").
Where a rule departs from llama.cpp's, a comment says so, and whence it is.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s+(?!\S)|\s+"
_END = rf"\s*[\r\n]+|{_SPACE}"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACE}"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_END}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|{_END}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}"
)
_MARKED = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_ASCII_SYMBOL = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = rf"{_ASCII_SYMBOL}[A-Za-z]+|{_MARKED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}"
_SPARK = rf"{_ASCII_SYMBOL}[A-Za-z]+|{_MARKED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACE}"
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
"""Threes of digits, counted from the right."""


def _cased(contraction: str, digits: str, symbols: str, outside: str = "") -> str:
    """Words that begin anew where a capital follows a small letter; llama.cpp tells capitals from
    small letters in ASCII only, or not at all."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{outside}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{outside}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}|"
        rf"{digits}|{symbols}|{_END}"
    )


_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _cased("", r"\p{N}", _SLASHED)
_GPT4O = _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}", _SLASHED)
_YOUTU = _cased(f"{_CONTRACTION}?", r"\p{N}", _SLASHED)
_KIMI = r"[\p{Han}]+|" + _cased(
    f"{_CONTRACTION}?", r"\p{N}{1,3}", _SYMBOLS, outside=r"&&[^\p{Han}]"
)

_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17Ａ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
"""The step from characters to bytes."""


@dataclass(frozen=True)
class Words:
    """How tokenizers of some names make words of a text.

    `splits` are done one after another: expressions that split off what they match, or steps as
    tokenizer.json has them. `composed`: characters are composed (NFC) first. `whole`: a word that
    is a token is taken as such, whatever the merges say. `bos`: BOS comes first unless the file
    says otherwise. `spaced`: spaces are written ▁, and merges are of characters, not of bytes.
    """

    names: str
    splits: tuple = ()
    composed: bool = False
    whole: bool = False
    bos: bool = False
    spaced: bool = False

    def steps(self) -> dict | None:
        """The pre-tokenizer, as tokenizer.json has it."""
        steps = [step if isinstance(step, dict) else _isolated(step) for step in self.splits]
        if not self.spaced and BYTES not in steps:
            steps.append(BYTES)
        return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _isolated(expression: str) -> dict:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


_RULES = (
    Words(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        (_LLAMA3,),
        whole=True,
        bos=True,
    ),
    Words("dbrx smaug-bpe chatglm-bpe", (_LLAMA3,)),
    Words("glm4 glm5", (_LLAMA3,), whole=True),
    Words(
        "jais-2",
        (
            f"{_CONTRACTION}|{_LETTERS}|\\p{{N}}{{1,3}}|{_SYMBOLS}|\\s*[\\r\\n]+|"
            + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
            + r"|\s{1}",
        ),
    ),
    Words("minicpm5", (r"\p{N}{1,3}", _QWEN2.replace(r"\p{N}|", r"\p{N}+|")), whole=True),
    # Qwen's and Stability's tokenizers compose characters (transformers' tokenization_qwen2.py,
    # stablelm-2's tokenization_arcade100k.py); llama.cpp does not.
    Words("qwen2 stablelm2", (_QWEN2,), composed=True),
    Words("deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2", (_QWEN2,)),
    Words("qwen35", (_QWEN35,), composed=True),  # transformers' tokenization_qwen3_5.py
    Words("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    Words("ufakzeka", (f"{_LETTERS}|\\p{{N}}|{_SYMBOLS}|{_END}",)),
    Words(
        "bailingmoe bailingmoe2 llada-moe",
        (f"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\\p{{N}}|{_SYMBOLS}|\\s*[\\r\\n]|{_SPACE}",),
    ),
    Words(
        "seed-coder",
        (f"{_CONTRACTION}|{_LETTERS}|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\\r\\n]+|{_END}",),
    ),
    Words(
        "exaone-moe",
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|"
            rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACE}",
        ),
    ),
    Words(
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe "
        "gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling",
        (_GPT2,),
    ),
    # Made from GPT-NeoX's tokenizer, which composes characters (transformers'
    # tokenization_gpt_neox.py); llama.cpp does not.
    Words("mpt olmo modern-bert", (_GPT2,), composed=True),
    Words(
        "starcoder refact smollm codeshell exaone minerva-7b mellum2",
        (r"\p{N}", _GPT2),
    ),
    Words("command-r", (r"\p{N}", _GPT2), composed=True),  # transformers' tokenization_cohere.py
    # Falcon's tokenizer.json: digits are split off after the step to bytes, three by three; in
    # llama.cpp a space stays with the digits after it (issue 3502 of llama.cpp quotes the file).
    Words(
        "falcon",
        (
            r"[!-/:-@\[-`{-~\p{P}]+",
            _GPT2,
            BYTES,
            {"type": "Digits", "individual_digits": False},
            "[0-9][0-9][0-9]",
        ),
    ),
    Words(
        "chameleon",
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        bos=True,
    ),
    # DeepSeek LLM's tokenizer.json splits off each digit, llama.cpp runs of them.
    Words(
        "deepseek-llm",
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE_KOREAN,
            r"\p{N}",
        ),
    ),
    Words("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}")),
    Words(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        (r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3),
    ),
    Words("spark2_5", (r"\p{N}{1,3}", _CHINESE_JAPANESE, _SPARK, r"\p{N}")),
    # In llama.cpp the third range begins at \u8c48, which \uf900 composes to.
    Words(
        "afmoe",
        (
            _THREES,
            "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
            _DEEPSEEK3,
        ),
    ),
    Words("bloom poro-chat gpt3-finnish", (_BLOOM,)),
    Words("viking", (_BLOOM, r"\p{N}")),
    Words("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    Words("tekken", (_TEKKEN,), whole=True, bos=True),
    Words("gpt-4o llama4 kanana2 talkie minimax-m2", (_GPT4O,)),
    Words("granite-embed-multi-97m", (_GPT4O,), whole=True),
    Words("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    Words("kimi-k2", (_KIMI,)),
    Words(
        "youtu",
        (
            "[가-힣ㄱ-ㆎ]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
            f"\ufe30-\ufe4f]+|[ㄅ-ㄯ]+|{_CHINESE_JAPANESE}",
            _YOUTU,
        ),
        whole=True,
    ),
    # Gemma's tokenizer.json splits at spaces, of which there are none left (transformers'
    # tokenization_gemma.py); llama.cpp splits off newlines, which merge with nothing else.
    Words("gemma4 granite-embed-multi-311m", bos=True, spaced=True),
    Words("sarvam-moe", spaced=True),
    Words(  # llama.cpp's guess for files that name none
        "default",
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
)
BY_NAME = {name: words for words in _RULES for name in words.names.split()}
