"""Masks for phrases, made once by a teacher and stored as a data set: training never runs the teacher."""

from .teacher import TEACHERS, VARIANTS, Masks, Prompt, Teacher, load_teacher


__all__ = ["TEACHERS", "VARIANTS", "Masks", "Prompt", "Teacher", "load_teacher"]
