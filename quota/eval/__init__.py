"""Measuring: questions, batched greedy answers, accuracy, retention with intervals, time and bytes."""
