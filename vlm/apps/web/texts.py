"""Every text of the page, in English and Chinese."""

from __future__ import annotations

from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

# name -> English, Chinese. Places in braces are filled by `tell`.
_TEXTS: dict[str, tuple[str, str]] = {
    # the page
    "title": ("Image chat", "看图对话"),
    "welcome": ("Show it an image and ask about it.", "上传图片，向模型提问。"),
    "welcome_more": ("Several images per message are fine.", "每条消息可以包含多张图片。"),
    "input": ("Ask, or drop images here", "输入问题，或拖入图片"),
    "model": ("Model", "模型"),
    "model_info": ("Loaded when it is first asked", "首次提问时加载"),
    "system": ("System prompt", "系统提示词"),
    "system_info": ("Empty: what the model was trained with", "留空则使用训练时的设定"),
    "clear": ("New chat", "新对话"),
    "save": ("Save as training record", "保存为训练数据"),
    "language": ("中文", "English"),  # the button names the language it switches to
    # settings
    "do_sample": ("Sample", "随机采样"),
    "do_sample_info": ("Off: always the likeliest token", "关闭时总取概率最高的词元"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "top_k_info": ("0: all tokens", "0 表示不限制"),
    "num_beams": ("Beams", "束搜索宽度"),
    "num_beams_info": ("More than 1: the answer appears at its end", "大于 1 时，回答在结束后一次显示"),
    "length_penalty": ("Length penalty of beams", "束搜索的长度惩罚"),
    "length_penalty_info": ("Under 1: shorter answers", "小于 1 时偏向短回答"),
    "max_new_tokens": ("Longest answer (tokens)", "回答的最大词元数"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("-1: another answer each time", "-1 表示每次不同"),
    "sampling": ("Sampling", "采样"),
    # beside answers
    "loading": ("Loading {model}", "正在加载 {model}"),
    "reading": ("Reading …", "正在读取…"),
    "waiting": ("Waiting for its turn …", "排队中…"),
    "stats": (
        "{tokens} tokens · {seconds:.1f} s · {rate:.0f} tokens/s",
        "{tokens} 个词元 · {seconds:.1f} 秒 · {rate:.0f} 词元/秒",
    ),
    "first": ("first after {seconds:.1f} s", "首个词元 {seconds:.1f} 秒"),
    "stopped": ("stopped", "已停止"),
    "full_length": ("cut at the longest answer", "已达最大长度"),
    "no_words": ("(no words)", "（无内容）"),
    # what went wrong
    "nothing_asked": ("Type a question or add an image first.", "请先输入问题或添加图片。"),
    "busy": ("An answer is being written. Stop it first.", "正在回答，请先停止。"),
    "question_too_long": ("The question is longer than {limit:,} characters.", "问题超过 {limit:,} 个字符。"),
    "too_many_images": ("At most {limit} images per message.", "每条消息最多 {limit} 张图片。"),
    "not_yours": (
        "An image of this message was not uploaded here. Add it again.",
        "消息中的图片不是在此上传的，请重新添加。",
    ),
    "bad_image": (
        "{name} is no image that can be read. Use PNG, JPEG, WebP, GIF, BMP or TIFF.",
        "无法读取图片 {name}。请使用 PNG、JPEG、WebP、GIF、BMP 或 TIFF 格式。",
    ),
    "image_too_large": (
        "{name} has too many pixels (at most {limit} million).",
        "图片 {name} 的像素过多（最多 {limit} 百万）。",
    ),
    "file_too_large": ("The file is larger than {limit} MB.", "文件超过 {limit} MB。"),
    "upload_full": ("The server holds too many images. Try later.", "服务器上的图片过多，请稍后再试。"),
    "upload_failed": ("The upload failed. Try again.", "上传失败，请重试。"),
    "image_gone": ("An image of this conversation is no longer there.", "对话中的图片已不存在。"),
    "no_images": ("This model reads no images.", "这个模型不支持图片。"),
    "too_long": (
        "The conversation is longer than this model can read. Start a new one, or take questions back.",
        "对话超出模型可读取的长度。请开始新对话，或撤回一些问题。",
    ),
    "too_many_wait": ("Too many questions wait. Ask again in a moment.", "排队的问题过多，请稍后再试。"),
    "bad_setting": ("A setting is out of its range: {name}.", "设置超出范围：{name}。"),
    "no_model": ("There is no such model.", "没有这个模型。"),
    "load_failed": (
        "{model} cannot be loaded. The server's log says why.",
        "无法加载 {model}，原因见服务器日志。",
    ),
    "failed": (
        "The answer failed. The server's log says why.",
        "回答出错，原因见服务器日志。",
    ),
    "no_turn": ("That message is no longer there.", "该消息已不存在。"),
    "nothing_to_save": ("There is no answer to save yet.", "还没有可保存的回答。"),
    "other_browser": (
        "This conversation belongs to another browser. Reload the page.",
        "此对话属于其他浏览器，请刷新页面。",
    ),
    # examples
    "example_1": ("What is in this image?", "这张图片里有什么？"),
    "example_2": ("What kind of thing is this?", "这是什么类型的东西？"),
    "example_3": ("Tell me a short story.", "讲一个简短的故事。"),
}  # fmt: skip

# Gradio's own buttons, by their English names.
BUTTONS = {
    "Clear": "清空",
    "Copy message": "复制",
    "Copied message": "已复制",
    "Edit": "编辑",
    "Retry": "重新回答",
    "Undo": "撤回",
    "Submit": "提交",
    "Cancel": "取消",
    "Stop": "停止",
    "Close": "关闭",
    "Fullscreen": "全屏",
    "Exit fullscreen mode": "退出全屏",
    "Share": "分享",
    "Upload a file": "上传图片",
    "Click to upload or drop files": "点击上传或拖放图片",
    "Remove file": "移除图片",
    "Scroll to bottom": "滚动到底部",
    "Toggle Sidebar": "设置面板",
    "Light or dark": "浅色 / 深色",
    "Reset to default value": "恢复默认值",
}


def tell(language: Language, name: str, /, **places: object) -> str:
    """A text of the page.

    >>> tell("en", "too_many_images", limit=8)
    'At most 8 images per message.'
    """
    return _TEXTS[name][LANGUAGES.index(language)].format(**places)


def tell_both(name: str, /, **places: object) -> str:
    """In both languages, where the language of the reader is not known."""
    return "  ".join(tell(language, name, **places) for language in LANGUAGES)


def preferred(accept_language: str | None, remembered: str | None = None) -> Language:
    """What this browser chose before, else by its `Accept-Language`.

    >>> preferred("zh-CN,zh;q=0.9,en;q=0.8"), preferred("de,zh;q=0.5"), preferred(None), preferred("zh", "en")
    ('zh', 'en', 'en', 'en')
    """
    for language in LANGUAGES:
        if remembered == language:
            return language
    return "zh" if (accept_language or "").strip().lower().startswith("zh") else "en"
