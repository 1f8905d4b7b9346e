"""How byte-level BPE splits text into words before it merges: `tokenizer.ggml.pre`, as data.

The names are those that llama.cpp knows (src/llama-vocab.cpp). Regexes of a rule apply one after another, each to the
pieces that the one before left: what it matches is a piece, and so is what lies between two matches. Where llama.cpp
can only approximate a model's regex (upper case and lower case beyond ASCII, accents, case-insensitive groups), or
leaves out that text is composed first, the model's own tokenizer is followed: the model has seen no other words.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
    """regexes : in Oniguruma's syntax, in the order in which they apply
    whole_words : a word that is a token is that token, whatever the merges say
    add_bos : text begins with the BOS token where the file does not say
    nfc : text is composed (Unicode's NFC) first
    byte_level : False where tokens are plain text with U+2581 for blanks, and bytes are tokens like <0x0A>
    """

    regexes: tuple
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False
    byte_level: bool = True


_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_DIGIT, _UP_TO_3_DIGITS = r"\p{N}", r"\p{N}{1,3}"


def _cl100k(digits: str, rest: str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES, endings: str = _ENDINGS + "|") -> str:
    return endings + r"[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + rest


def _o200k(digits: str, endings: str = _ENDINGS + "?", but: str = "", lines: str = r"[\r\n/]*") -> str:
    """Words begin at capital letters; `but` is taken from the letters."""
    upper, lower = (rf"[\p{{{case}}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]" for case in (r"Lu}\p{Lt", "Ll"))
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{endings}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{endings}|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+{lines}|" + _LINES
    )


_LLAMA3, _QWEN2 = _cl100k(_UP_TO_3_DIGITS), _cl100k(_DIGIT)
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_MARKS_AND_WORDS = _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (_UP_TO_3_DIGITS, "[一-龥぀-ゟ゠-ヿ]+", _MARKS_AND_WORDS + r"[\r\n]*|" + _LINES)
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎ"
    "ꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CHINESE_KOREAN = "[一-龥ࠀ-一가-\ud7ff]+"
_ASIAN = (
    "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
    "\ua9e0-\ua9ff가-\ud7af\u1100-\u11ff]+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CODE = (_DIGIT, _GPT2)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_TEXT_LINES = r"[^\n]+|\n+"

_BY_RULE = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe jais trillion granite-docling exaone4": Rule((_GPT2,)),
    "mpt olmo": Rule((_GPT2,), nfc=True),
    "command-r": Rule(_CODE, nfc=True),
    "starcoder refact smollm codeshell exaone minerva-7b mellum2": Rule(_CODE),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Rule(
        (_LLAMA3,), whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": Rule((_LLAMA3,)),
    "minicpm5": Rule((_UP_TO_3_DIGITS, _cl100k(r"\p{N}+")), whole_words=True),
    "jais-2": Rule(
        (
            _cl100k(
                _UP_TO_3_DIGITS,
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                + "".join(rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
                + r"\s{1}",
            ),
        )
    ),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": Rule((_QWEN2,), nfc=True),
    "stablelm2 hunyuan solar-open grok-2": Rule((_QWEN2,)),
    "qwen35": Rule(
        (_ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _LINES,), nfc=True
    ),
    "ufakzeka": Rule((_cl100k(_DIGIT, endings=""),)),
    "laguna": Rule((_TEXT_LINES, _QWEN2)),
    "seed-coder": Rule((_cl100k(_DIGIT, r"| ?[^\s\p{L}\p{N}\r\n]+|" + _LINES),)),
    "bailingmoe bailingmoe2 llada-moe": Rule(
        (_cl100k(_DIGIT, r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|" + _SPACES, "'(?i:[sdmt]|ll|ve|re)|"),)
    ),
    "exaone-moe": Rule(
        (
            _ENDINGS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|" + _SPACES,
        )
    ),
    "tekken": Rule((_o200k(_DIGIT, endings=""),), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Rule((_o200k(_UP_TO_3_DIGITS),)),
    "granite-embed-multi-97m": Rule((_o200k(_UP_TO_3_DIGITS),), whole_words=True),
    "tiny_aya cohere2moe": Rule((r"\d{1,3}(?=(?:\d{3})*\b)", _o200k(_UP_TO_3_DIGITS))),
    "kimi-k2": Rule((r"\p{Han}+|" + _o200k(_UP_TO_3_DIGITS, but=r"&&[^\p{Han}]", lines=r"[\r\n]*"),)),
    "youtu": Rule(
        ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+", _o200k(_DIGIT)), whole_words=True
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Rule(_DEEPSEEK3),
    "spark2_5": Rule((*_DEEPSEEK3[:2], _MARKS_AND_WORDS + r"|[\r\n]|" + _SPACES, _DIGIT)),
    "afmoe": Rule((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _DEEPSEEK3[2])),
    "deepseek-llm": Rule(
        (r"[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+", r"\s+$", _CHINESE_KOREAN, r"\p{N}+")
    ),
    "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, _DIGIT)),
    "falcon": Rule((_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": Rule((_BLOOM,)),
    "viking": Rule((_BLOOM, _DIGIT)),
    "superbpe": Rule((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "chameleon": Rule(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "gemma4 granite-embed-multi-311m": Rule((_TEXT_LINES,), add_bos=True, byte_level=False),
    "sarvam-moe": Rule((_TEXT_LINES,), byte_level=False),
}
RULES = {name: rule for names, rule in _BY_RULE.items() for name in names.split()}


def rule_of(name: object, where: object) -> Rule:
    """The Rule of a value of tokenizer.ggml.pre. ValueError naming it and those that are known."""
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre is {name!r:.60}, and how it splits words is not known here; "
            f"known are {', '.join(sorted(RULES))}; give a folder with the original model and its "
            "tokenizer"
        )
    return RULES[name]
