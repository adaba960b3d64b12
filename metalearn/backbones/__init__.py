"""Backbones: functions x -> embedding that know nothing of classes."""
