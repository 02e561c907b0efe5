"""Which settings ``vk.attach`` should have by default: the study that PLAN-defaults.md describes."""
