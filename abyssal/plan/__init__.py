"""What a run would take, found by walking its real code on nothing: fake tensors, and ranks that aren't there."""

from abyssal.plan.report import Plan, plan

__all__ = ["Plan", "plan"]
