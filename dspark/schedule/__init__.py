"""Scheduling: the policies, and the one registry of their names, sliders, labels and colours."""

from dspark.schedule.auto import Auto
from dspark.schedule.policies import MTP1, SPS, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, Shortened
from dspark.schedule.prefix import Admission, PrefixScheduler
from dspark.schedule.registry import POLICIES, Parameter, PolicyRow, make_policy, parse_policy
from dspark.schedule.topk import AsyncTopK
