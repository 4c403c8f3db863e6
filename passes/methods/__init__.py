"""Quantisation methods by name; to add one, write its file and its line here."""

from passes.methods import awq, duquant, flatquant, freeact, gptq, none, quarot, rtn, smoothquant, star
from passes.methods.method import Method

METHODS: dict[str, Method] = {
    "none": none.METHOD,
    "rtn": rtn.METHOD,
    "smoothquant": smoothquant.METHOD,
    "awq": awq.METHOD,
    "gptq": gptq.METHOD,
    "quarot": quarot.METHOD,
    "duquant": duquant.METHOD,
    "flatquant": flatquant.METHOD,
    "freeact": freeact.METHOD,
    "star": star.METHOD,
}
