"""What PeftRank is measured against, one file each, written at its best.

A peer's file has `training(setting)` and `scoring(setting)`, or one of them; each returns a `Case`.
All cases share one base, one LoRA, the same slates, precision and process.
"""
