"""Every text of the studio, in English and Chinese. What a key of the config means is told as the docs tell it."""

from __future__ import annotations

from vlm.apps.web.texts import LANGUAGES, Language

# name -> English, Chinese. Places in braces are filled by `tell`.
_TEXTS: dict[str, tuple[str, str]] = {
    "title": ("Training studio", "训练工作室"),
    "language": ("中文", "English"),  # the button names the language it switches to
    "configure": ("Configure", "配置"),
    "runs": ("Runs", "训练"),
    "chat": ("Chat", "对话"),
    # configure
    "project": ("Begin from", "起点"),
    "project_info": (
        "A shipped project, a run's config, or the path of a YAML file",
        "内置项目、训练的配置，或 YAML 文件路径",
    ),
    "nproc": ("Processes", "进程数"),
    "filter": ("Find a key or a word", "查找配置项"),
    "default": ("default", "默认"),
    "as_project": ("as in the project", "同项目"),
    "required": ("required", "必填"),
    "keys_below": ("keys below", "见下列各项"),
    "keys_of_entry": ("Keys of an entry", "每项的键"),
    "of_kind": ("of kind", "适用类型"),
    "top": ("Run", "总体"),
    "valid": ("Everything is valid.", "配置有效。"),
    "problems": ("{count} to mend", "{count} 处需要修改"),
    "nothing_loaded": ("Choose what to begin from.", "请先选择起点。"),
    "command": ("Command", "命令"),
    "yaml": ("The whole config", "完整配置"),
    "records": ("Records", "数据预览"),
    "show_records": ("Show records", "预览数据"),
    "show_records_info": (
        "Green is what the model learns to write; the rest it only reads.",
        "绿色为模型要学习输出的词元，其余只作为输入。",
    ),
    "plan": ("Plan", "资源估算"),
    "show_plan": ("Will it fit, how long will it take?", "估算显存与时间"),
    "working": ("Working …", "运行中…"),
    "start": ("Start training", "开始训练"),
    "started": ("Started in {run}.", "已在 {run} 开始训练。"),
    "mend_first": ("Mend what is marked first.", "请先修改标出的问题。"),
    "outside": (
        "output_dir {run} is not below {runs}, so the list of runs would not show it.",
        "output_dir {run} 不在 {runs} 之下，训练列表中将看不到它。",
    ),
    # runs
    "no_runs": ("No run below {runs} yet.", "{runs} 下还没有训练。"),
    "run": ("Run", "训练"),
    "compare": ("Draw over it", "叠加对比"),
    "number": ("Second curve", "第二条曲线"),
    "state": ("State", "状态"),
    "step": ("Step", "步"),
    "loss": ("Loss", "损失"),
    "reward": ("Reward", "奖励"),
    "held_out": ("Held out", "验证损失"),
    "rate": ("Rate", "学习率"),
    "speed": ("Tokens/s", "词元/秒"),
    "left": ("Left", "剩余"),
    "stop": ("Stop", "停止"),
    "resume": ("Resume", "继续"),
    "export": ("Export", "导出"),
    "evaluate": ("Evaluate", "评测"),
    "predict": ("Predict", "预测"),
    "export_options": ("What to export", "导出选项"),
    "checkpoint": ("Checkpoint", "检查点"),
    "newest": ("the newest", "最新"),
    "best": ("the best ({step})", "最佳（{step}）"),
    "full": ("Everything merged", "合并全部权重"),
    "full_info": ("else only what was trained", "否则只导出训练过的部分"),
    "shard_size": ("Largest file", "单个文件上限"),
    "predict_options": ("What to evaluate and predict", "评测与预测选项"),
    "of_export": ("Export", "导出的模型"),
    "data": ("File of records", "数据文件"),
    "data_info": ("empty: the tasks of the config", "留空则用配置中的任务"),
    "images": ("Folder of its images", "图片目录"),
    "images_info": ("empty: beside the file", "留空则在数据文件旁"),
    "metrics": ("Metrics", "指标"),
    "metrics_info": ("compare with the file's answers", "与文件中的答案比较"),
    "max_records": ("At most", "最多条数"),
    "max_records_info": ("0: all records", "0 为全部"),
    "out": ("Into the folder", "输出目录名"),
    "predictions": ("Predictions", "预测结果"),
    "question": ("Question", "问题"),
    "reference": ("Reference", "参考答案"),
    "answer": ("Answer", "回答"),
    "log": ("Log", "日志"),
    "samples": ("Samples", "样例"),
    "figures": ("Evaluation", "评测结果"),
    "nothing_yet": ("Nothing yet.", "暂无内容。"),
    "no_log": (
        "No log here: the run is of an earlier version, or has not begun.",
        "没有日志：该训练由旧版本运行，或尚未开始。",
    ),
    "asked_to_stop": ("Asked to stop: it finishes the step and saves.", "已请求停止：完成当前步并保存。"),
    "ended": ("Ended: {command}", "已结束：{command}"),
    "begun": ("Begun: {command}", "已开始：{command}"),
    "choose_run": ("Choose a run first.", "请先选择一个训练。"),
    "job_running": ("running: {jobs}", "正在运行：{jobs}"),
    # states
    "starting": ("starting", "启动中"),
    "not_started": ("did not start", "未能启动"),
    "running": ("running", "训练中"),
    "finished": ("finished", "已完成"),
    "stopped": ("stopped", "已停止"),
    "failed": ("failed", "失败"),
    "interrupted": ("interrupted", "中断"),
    # chat
    "result": ("Result", "训练结果"),
    "base": ("Base", "基座"),
    "model_info": ("Loaded when it is first asked", "首次提问时加载"),
    "input": ("Ask both, or drop an image here", "同时提问两个模型，或拖入图片"),
    "clear": ("New chat", "新对话"),
    "unload": ("Unload the models", "卸载模型"),
    "unloaded": ("{count} of the models taken out of memory.", "已从内存卸载 {count} 个模型。"),
    "tokens": ("Longest answer (tokens)", "回答的最大词元数"),
}

# Gradio's own buttons, by their English names.
BUTTONS = {
    "Copy": "复制",
    "Download": "下载",
    "Submit": "提交",
    "Stop": "停止",
    "Clear": "清空",
    "Copy message": "复制",
    "Share": "分享",  # hidden by its name
    "Fullscreen": "全屏",
    "Exit fullscreen mode": "退出全屏",
    "Upload a file": "上传图片",
    "Click to upload or drop files": "点击上传或拖放图片",
    "Remove file": "移除图片",
    "Scroll to bottom": "滚动到底部",
    "Light or dark": "浅色 / 深色",
}


def tell(language: Language, name: str, /, **places: object) -> str:
    """A text of the page.

    >>> tell("en", "problems", count=2)
    '2 to mend'
    """
    return _TEXTS[name][LANGUAGES.index(language)].format(**places)
