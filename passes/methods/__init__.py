"""Quantisation methods by name; to add one, write its file and its line here."""

from passes.methods import none, rtn
from passes.methods.method import Method

METHODS: dict[str, Method] = {
    "none": none.METHOD,
    "rtn": rtn.METHOD,
}
