"""Pretrain a student for SVAMP where T5's weights cannot be had: generated word problems, with equations and explanations in words.

    python fetch_data.py svamp; python results/svamp_student.py         # weights/svamp-student/; minutes, see results/README.md
    python qcrd.py --task svamp --model weights/svamp-student --lr 1e-3 --teacher URL

What it learns from: the STORIES below, written for this after the kinds of problems in SVAMP's training split, filled with people, things
and numbers at random. Of SVAMP itself it reads the text of the 720 training questions: for the vocabulary, for span corruption, and for
words to call things by. No label, no rationale of a teacher, no question of another split is read.
"""
import argparse
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch_data  # noqa: E402
import t5  # noqa: E402

# {n} {m}: people; {he} {his} {him}: n; {o} {p} {q}: things; {b}: what holds things; {l}: a place; {d} {e} {f}: days; {w} {x} {y} {z}: numbers, all
# different; {k} {j}: numbers that do not matter; {r}: the result. Only what the equation needs is made possible: in one story of eight another
# number is not (4 picked, 47 sold).
SHE = "Mary Rachel Julia Emily Olivia Lucy Jessica Nell Robin Helen Haley Rebecca Katie Kelly Faye Carol Debby Tiffany Brenda Melissa Nadia Ruth Ida".split()
HE = "Frank Josh Dan Dave Jack Paul Edward Matthew Bobby Danny Jake Steven Jerry Zachary David Adam Philip Bryan Allan Marco Ed Jason Lewis Omar Luke".split()
THINGS = """apples oranges peaches bananas cookies cakes pastries marbles pencils crayons books magazines cards stamps balloons shells coins stickers toys
balls blocks eggs candies chocolates flowers roses orchids tickets bottles cans caps wrappers shirts t-shirts jerseys trousers hats pens erasers files apps
photos movies emails letters points pizzas pies games tomatoes potatoes carrots seeds chairs tables bags beads necklaces feathers skittles crackers cupcakes
buttons pictures kids girls boys students customers visitors birds fish goldfish snakes cats dogs pages problems pounds cups sacks bookmarks keys rings""".split()
HOLDERS = "boxes bags packs packages baskets rows shelves groups jars crates trays buses tables rooms vases pots classes drawers".split()
PLACES = ["school", "park", "zoo", "store", "library", "garden", "farm", "beach", "market", "museum", "playground", "supermarket", "showroom", "bakery"]
TIMES = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

# (story, [(question, equation, answer in words)]); the equation's value must be a positive whole number, or the numbers are drawn again.
STORIES = [
    ("{n} had {w} {o}. {He} gave {x} {o} to {m}.", [
        ("How many {o} does {n} have left?", "w - x", "{n} has {r} {o} left"), ("How many {o} does {n} have now?", "w - x", "{n} has {r} {o} now")]),
    ("{n} had {w} {o} and {y} {p}. {He} lost {x} {o}.", [
        ("How many {o} are left with {him}?", "w - x", "there are {r} {o} left"), ("How many {o} and {p} did {he} have at first?", "w + y", "{n} had {r} in all"),
        ("How many {o} and {p} does {he} have now?", "( w - x ) + y", "{n} has {r} now")]),
    ("{n} has {w} {o} after giving {x} {o} to {m}.", [
        ("How many {o} did {n} have initially?", "w + x", "{n} had {r} {o} initially"), ("How many {o} did {he} have before?", "w + x", "{n} had {r} {o} before")]),
    ("{n} had some {o}. {He} used {x} of them and has {w} left.", [
        ("How many {o} did {he} have at the start?", "w + x", "{n} had {r} {o} at the start"), ("How many more {o} are left than were used?", "w - x", "{r} more are left")]),
    ("{n} had {w} {o}. {He} ate some of them and now has {x} {o}.", [
        ("How many {o} did {n} eat?", "w - x", "{n} ate {r} {o}"), ("How many {o} were eaten?", "w - x", "{r} {o} were eaten")]),
    ("{n} started with {w} {o} and {y} {p}. After giving some away {he} has {x} {o} and {z} {p}.", [
        ("How many {o} did {he} give away?", "w - x", "{n} gave away {r} {o}"), ("How many {p} did {he} give away?", "y - z", "{n} gave away {r} {p}"),
        ("How many more {o} than {p} does {n} have left?", "x - z", "{n} has {r} more {o} left")]),
    ("{n} had {w} {o}. {He} found {x} new {o} and lost {y} of {his} old ones.", [
        ("How many {o} does {he} have now?", "( w + x ) - y", "{n} has {r} {o} now"), ("How many more {o} did {he} find than {he} lost?", "x - y", "{n} found {r} more"),
        ("How many more {o} did {he} lose than {he} found?", "y - x", "{n} lost {r} more")]),
    ("There were {w} {o} on the shelf. {n} added {x} more and later removed {y}.", [
        ("How many {o} are on the shelf now?", "( w + x ) - y", "there are {r} {o} now"), ("How many more {o} were added than removed?", "x - y", "{r} more were added"),
        ("How many {o} were there before {n} removed any?", "w + x", "there were {r} {o}")]),
    ("{n} had some {o} in {his} collection. {He} got {x} more and then had {w} {o}.", [
        ("How many {o} did {n} have before?", "w - x", "{n} had {r} {o} before"), ("How many {o} were in the collection at first?", "w - x", "there were {r} at first")]),
    ("{n} bought {x} {o} to add to the {w} {o} that {he} had. {He} also has {y} {p}.", [
        ("How many {o} does {he} have now?", "w + x", "{n} has {r} {o} now"), ("How many {o} and {p} does {he} have in all?", "( w + x ) + y", "{n} has {r} in all")]),
    ("{w} {o} were in the {l}. {x} more joined them and {y} went away.", [
        ("How many {o} are in the {l} now?", "( w + x ) - y", "there are {r} {o} now"), ("How many {o} were there before some went away?", "w + x", "there were {r} {o}")]),
    ("There were {w} {o} in the {l}. Some went away and {x} are still there.", [
        ("How many {o} went away?", "w - x", "{r} {o} went away")]),
    ("There were {w} people on the bus. At the stop {x} people got off and {y} got on.", [
        ("How many people are on the bus now?", "( w - x ) + y", "{r} people are on the bus"), ("How many more people got off than got on?", "x - y", "{r} more got off"),
        ("How many people were left on the bus after the stop if nobody had got on?", "w - x", "{r} people were left")]),
    ("{x} people got off the bus and now {w} are on it.", [("How many people were on the bus before?", "w + x", "{r} people were on the bus")]),
    ("Some {o} were in the {l}. After {x} more came there were {w} {o} in total.", [("How many {o} were there at first?", "w - x", "there were {r} {o} at first")]),
    ("{n} has {w} {o} and {x} {p}.", [
        ("How many more {o} than {p} does {n} have?", "w - x", "{n} has {r} more {o} than {p}"), ("How many fewer {o} than {p} does {he} have?", "x - w", "{n} has {r} fewer"),
        ("How many {o} and {p} does {n} have in all?", "w + x", "{n} has {r} in all"), ("How many items are there altogether?", "w + x", "there are {r} altogether")]),
    ("{n} has {w} {o}, {x} {p} and {y} {q}.", [
        ("How many {o} and {q} does {he} have?", "w + y", "{n} has {r} of them"), ("How many more {p} than {q} are there?", "x - y", "there are {r} more {p}"),
        ("How many {o}, {p} and {q} are there altogether?", "( w + x ) + y", "there are {r} in all"), ("How many fewer {q} than {o} are there?", "w - y", "there are {r} fewer")]),
    ("{n} has {w} more {o} than {m}. {m} has {x} {o} and {y} {p}.", [
        ("How many {o} does {n} have?", "x + w", "{n} has {r} {o}"), ("How many {o} and {p} does {m} have?", "x + y", "{m} has {r} in all"),
        ("How many more {p} than {o} does {m} have?", "y - x", "{m} has {r} more {p}"), ("How many {o} do they have together?", "( x + x ) + w", "they have {r} {o}")]),
    ("{n} has {w} fewer {o} than {m}. {m} has {x} {o}.", [("How many {o} does {n} have?", "x - w", "{n} has {r} {o}")]),
    ("{m} has {x} {o}. {n} has {w} less {o} and {y} more {p} than {m}. {m} has {z} {p}.", [
        ("How many {o} does {n} have?", "x - w", "{n} has {r} {o}"), ("How many {p} does {n} have?", "z + y", "{n} has {r} {p}"),
        ("How many more {o} than {p} does {m} have?", "x - z", "{m} has {r} more {o}")]),
    ("{n} did {w} {o} and {m} did {x} {o} in class today. They both have {y} {p}.", [
        ("How many more {o} did {n} do than {m}?", "w - x", "{n} did {r} more"), ("How many {o} did they do altogether?", "w + x", "they did {r} altogether")]),
    ("{n} jumped {w} inches and {m} jumped {x} inches farther than {n}.", [
        ("How far did {m} jump?", "w + x", "{m} jumped {r} inches"), ("How far did they jump in all?", "w + ( w + x )", "they jumped {r} inches")]),
    ("{n} jumped {w} inches. It was {x} inches farther than {m} jumped.", [("How far did {m} jump?", "w - x", "{m} jumped {r} inches")]),
    ("The {l} is {w} feet long and {x} feet wide.", [
        ("How much longer is it than it is wide?", "w - x", "it is {r} feet longer"), ("What is the area of its floor in square feet?", "w * x", "the area is {r} square feet")]),
    ("{n} weighed {w} kilograms. {He} lost {x} kilograms in summer.", [("How much does {he} weigh now?", "w - x", "{n} weighs {r} kilograms")]),
    ("{n} lost {x} kilograms and weighs {w} kilograms now.", [("How much did {he} weigh before?", "w + x", "{n} weighed {r} kilograms")]),
    ("Out of {w} {o} in the {l} {x} were red and the rest were green.", [
        ("How many {o} were green?", "w - x", "{r} {o} were green"), ("How many {o} were not red?", "w - x", "{r} {o} were not red")]),
    ("{x} red {o}, {w} yellow {o} and {y} green {o} are in the basket.", [
        ("How many more yellow {o} than red {o} are there?", "w - x", "there are {r} more yellow {o}"), ("How many green and red {o} are there?", "x + y", "there are {r} of them"),
        ("How many {o} are in the basket?", "( x + w ) + y", "there are {r} {o}"), ("How many fewer green {o} than yellow {o} are there?", "w - y", "there are {r} fewer")]),
    ("{n} has {w} {o}. {x} are {p} and the others are {q}.", [("How many {q} does {n} have?", "w - x", "{n} has {r} {q}")]),
    ("In the {l} there are {w} boys and {x} more girls than boys.", [
        ("How many girls are there?", "w + x", "there are {r} girls"), ("How many children are there in all?", "w + ( w + x )", "there are {r} children")]),
    ("{n} and {m} together have {w} {o}. {m} has {x} {o}.", [("How many {o} does {n} have?", "w - x", "{n} has {r} {o}")]),
    ("{n} saw {w} {o} on {d}, {x} on {e} and {y} on {f}.", [
        ("How many {o} did {he} see altogether?", "( w + x ) + y", "{n} saw {r} {o}"), ("How many {o} did {he} see on {d} and {f}?", "w + y", "{n} saw {r} {o}"),
        ("How many more {o} did {he} see on {d} than on {e}?", "w - x", "{n} saw {r} more"), ("How many more {o} were there on {f} than on {d}?", "y - w", "there were {r} more")]),
    ("{n} received {w} {o} in the morning and {x} {o} in the afternoon. {He} sent {y} {p}.", [
        ("How many {o} did {he} receive in the day?", "w + x", "{n} received {r} {o}"), ("How many more {o} came in the morning than in the afternoon?", "w - x", "{r} more came"),
        ("How many more {o} came in the afternoon than in the morning?", "x - w", "{r} more came")]),
    ("{n} met {w} {o} in all. {He} met {x} of them on {d} and the rest on {e}.", [("How many {o} did {he} meet on {e}?", "w - x", "{n} met {r} {o} on {e}")]),
    ("{n} met {x} {o} on {d}. {He} met {w} more on {e} than on {d}.", [
        ("How many {o} did {he} meet on {e}?", "x + w", "{n} met {r} {o}"), ("How many {o} did {he} meet on the two days?", "x + ( x + w )", "{n} met {r} {o}")]),
    ("The recipe calls for {w} cups of flour and {y} cups of sugar. {n} already put in {x} cups of flour.", [
        ("How many more cups of flour does {he} need to add?", "w - x", "{n} needs {r} more cups"), ("How many cups of flour and sugar are needed in all?", "w + y", "{r} cups are needed"),
        ("How many more cups of sugar than flour does the recipe call for?", "y - w", "it calls for {r} more cups")]),
    ("{n} put in {x} cups of sugar. {He} still needs to add {w} cups.", [("How many cups of sugar does the recipe call for?", "x + w", "it calls for {r} cups")]),
    ("{n} had $ {w}. {He} spent $ {x} on {o} and $ {y} on {p}.", [
        ("How much money does {he} have left?", "( w - x ) - y", "{n} has {r} dollars left"), ("How much did {he} spend in all?", "x + y", "{n} spent {r} dollars"),
        ("How much more did {he} spend on {o} than on {p}?", "x - y", "{n} spent {r} dollars more")]),
    ("{n} spent {w} dollars at the {l} and has {x} dollars left.", [
        ("How much money did {he} have at the beginning?", "w + x", "{n} had {r} dollars"), ("How much more did {he} spend than {he} has left?", "w - x", "{r} dollars more")]),
    ("{n} had {w} dollars. After buying a toy {he} has {x} dollars left.", [("How much did the toy cost?", "w - x", "the toy cost {r} dollars")]),
    ("A pack of {o} costs {w} dollars. There is a discount of {x} dollars on each pack.", [
        ("How much does each pack cost now?", "w - x", "each pack costs {r} dollars"), ("How much do {y} packs cost with the discount?", "( w - x ) * y", "they cost {r} dollars")]),
    ("{n} makes $ {w} from each of the {o} and $ {x} from each of the {p}. {He} sold {y} {o} and {z} {p}.", [
        ("How much money did {he} make from the {o}?", "w * y", "{n} made {r} dollars"), ("How much money did {he} make from the {p}?", "x * z", "{n} made {r} dollars"),
        ("How many more {o} than {p} were sold?", "y - z", "{r} more {o} were sold"), ("How much more does one of the {o} bring than one of the {p}?", "w - x", "{r} dollars more")]),
    ("{n} bought {x} {o} for $ {w}. Each costs the same.", [("How much does one of them cost?", "w / x", "each costs {r} dollars")]),
    ("{n} bought {x} {o} for {w} dollars each. {He} had {y} dollars.", [("How much did {he} spend?", "x * w", "{n} spent {r} dollars"),
        ("How much money is left?", "y - ( x * w )", "{r} dollars are left")]),
    ("{n} earned {w} dollars in {x} days, the same each day.", [("How much did {he} earn per day?", "w / x", "{n} earned {r} dollars per day")]),
    ("{n} earned {w} dollars per day for {x} days.", [("How much money did {he} make in total?", "w * x", "{n} made {r} dollars")]),
    ("Each of the {x} {b} holds {w} {o}. {n} also has {y} {p}.", [
        ("How many {o} are there in all?", "x * w", "there are {r} {o}"), ("How many {o} and {p} are there in all?", "( x * w ) + y", "there are {r} in all")]),
    ("{n} bought {x} {b} of {o} with {w} {o} in each. {y} of the {o} were broken.", [
        ("How many {o} did {he} buy?", "x * w", "{n} bought {r} {o}"), ("How many {o} were not broken?", "( x * w ) - y", "{r} {o} were not broken")]),
    ("{n} bought {w} {b} of {o}, {x} {b} of {p} and {y} {b} of {q}.", [
        ("How many {b} did {he} buy in all?", "( w + x ) + y", "{n} bought {r} {b}"), ("How many {b} of {o} and {p} did {he} buy?", "w + x", "{n} bought {r} {b}"),
        ("How many more {b} of {q} than {p} did {he} buy?", "y - x", "{n} bought {r} more")]),
    ("{n} puts {w} {o} into {x} {b}, the same number in each. {m} has {y} {o}.", [
        ("How many {o} are in each of the {b}?", "w / x", "{r} {o} are in each"), ("How many {o} do they have altogether?", "w + y", "they have {r} {o}")]),
    ("The {w} {o} are organized into groups of {x}. There are {y} {p} too.", [
        ("How many groups are there?", "w / x", "there are {r} groups"), ("How many more {o} than {p} are there?", "w - y", "there are {r} more {o}")]),
    ("{n} has {w} {o} and {z} {p}. {He} puts them into {x} {b} of {o} and {y} {b} of {p}.", [
        ("How big is each group of {o}?", "w / x", "there are {r} {o} in each"), ("How big is each group of {p}?", "z / y", "there are {r} {p} in each"),
        ("How many {b} are there?", "x + y", "there are {r} {b}")]),
    ("Each of the {b} can hold {x} {o}. {n} has {w} {o}.", [("How many {b} does {n} need?", "w / x", "{n} needs {r} {b}"), ("How many {b} can {he} fill?", "w / x", "{n} can fill {r} {b}")]),
    ("{n} had {w} {o}. {He} lost {x} and put the rest into {b} with {y} in each.", [
        ("How many {b} did {he} fill?", "( w - x ) / y", "{n} filled {r} {b}"), ("How many {o} did {he} put into {b}?", "w - x", "{n} put {r} {o} there")]),
    ("{n} gave equal numbers of {o} to {x} friends. {He} had {w} {o} and {y} {p}.", [
        ("How many {o} did each friend get?", "w / x", "each friend got {r} {o}"), ("How many more {p} than {o} did {he} have?", "y - w", "{n} had {r} more {p}")]),
    ("A book has {w} pages in {x} chapters. {n} read it in {y} days.", [
        ("How many pages are in each chapter?", "w / x", "there are {r} pages in each chapter"), ("How many pages did {he} read per day?", "w / y", "{n} read {r} pages per day"),
        ("How many chapters did {he} read per day?", "x / y", "{n} read {r} chapters per day")]),
    ("They pick {w} sacks of ripe {o} and {x} sacks of unripe {o} per day. Each sack holds {y} {o}.", [
        ("How many sacks of ripe {o} will there be after {z} days?", "w * z", "there will be {r} sacks"), ("How many sacks are picked per day?", "w + x", "{r} sacks are picked"),
        ("How many sacks of unripe {o} will there be after {z} days?", "x * z", "there will be {r} sacks"), ("How many ripe {o} are picked per day?", "w * y", "{r} {o} are picked"),
        ("How many more sacks of ripe than of unripe {o} are picked per day?", "w - x", "{r} more sacks are picked")]),
    ("They fill {w} drums in {x} days. There are {y} workers.", [
        ("How many drums are filled per day?", "w / x", "{r} drums are filled per day"), ("How many days would {z} drums take at {y} drums a day?", "z / y", "it takes {r} days")]),
    ("A machine can make {x} {o} a minute. It made {w} {o} yesterday and {y} {o} today.", [
        ("How many minutes did it work today?", "y / x", "it worked {r} minutes"), ("How many minutes did it work in all?", "( w + y ) / x", "it worked {r} minutes"),
        ("How many {o} did it make on both days?", "w + y", "it made {r} {o}"), ("How many {o} can it make in {z} minutes?", "x * z", "it makes {r} {o}")]),
    ("A machine worked for {x} minutes and made {w} {o}.", [("How many {o} did it make a minute?", "w / x", "it made {r} {o} a minute")]),
    ("The pool is {x} times as deep as {n} is tall. {n} is {w} feet tall and {m} is {y} feet taller.", [
        ("How deep is the pool?", "x * w", "the pool is {r} feet deep"), ("How tall is {m}?", "w + y", "{m} is {r} feet tall")]),
    ("{n} scored {w} points in a game of {x} rounds, the same in each.", [("How many points did {he} score per round?", "w / x", "{n} scored {r} points per round")]),
    ("{n} has to do {w} pages of reading homework and {x} pages of math homework. {He} did {y} pages.", [
        ("How many pages are left?", "( w + x ) - y", "{r} pages are left"), ("How many more pages of reading than of math are there?", "w - x", "there are {r} more pages")]),
    ("{w} children went to the {l} by bus and {x} walked. Each bus had {y} seats.", [
        ("How many children went there?", "w + x", "{r} children went"), ("How many buses were needed?", "w / y", "{r} buses were needed"),
        ("How many more children went by bus than walked?", "w - x", "{r} more went by bus")]),
    ("{n} picked {w} {o} and sold {x} of them. {He} had {y} {o} in the {l} and ate {z}.", [
        ("How many {o} did {he} not sell of those that {he} picked?", "w - x", "{r} {o} were not sold"), ("How many {o} does {he} have now?", "( w - x ) + ( y - z )", "{n} has {r} {o}"),
        ("How many {o} were sold or eaten?", "x + z", "{r} {o} were sold or eaten")]),
]
OTHERS = ["{m} has {k} {q}.", "There are {k} {q} in the {l}.", "{n} also has {k} {q}.", "Last year there were {k} {q}.", "{m} bought {k} {q} for {j} dollars."]
SAY = {"+": ["add {s} and {t}", "add {t} to {s}"], "-": ["subtract {t} from {s}", "take {t} away from {s}"], "*": ["multiply {s} by {t}"], "/": ["divide {s} by {t}"]}
LEAD = ["To find the answer, we need to {v}.", "We {v}.", "First, we {v}.", "We can {v}.", "To solve this problem, we {v}.", "We have to {v}:"]
CLOSE = ["Therefore, {c}.", "So {c}.", "Thus, {c}.", "This means that {c}.", "Hence {c}."]


def number(rng: random.Random) -> int:
    """As SVAMP's numbers are spread: half below 20, one of twenty above 400."""
    return rng.randint(*rng.choices([(2, 12), (2, 30), (10, 99), (100, 500), (500, 9999)], [35, 30, 22, 10, 3])[0])


def work_out(equation: str, numbers: dict[str, int]) -> tuple[list[tuple], int] | None:
    """-> the steps (left, operator, right, result) innermost first, and the value; None where a step is no positive whole number."""
    tokens, steps = [numbers.get(t, t) for t in f"( {equation} )".split()], []
    while len(tokens) > 1:
        i = max(j for j, t in enumerate(tokens) if t == "(" and len(tokens) > j + 4 and tokens[j + 4] == ")")
        s, op, t = tokens[i + 1:i + 4]
        r = {"+": s + t, "-": s - t, "*": s * t, "/": s / t}[op]
        if r <= 0 or r != int(r):
            return None
        steps.append((s, op, t, int(r)))
        tokens[i:i + 5] = [int(r)]
    return steps, tokens[0]


def thing(rng: random.Random, known: list[str]) -> str:
    """What is counted: of THINGS, or one to three words that mean nothing here, so that the student learns to take any words for it."""
    if not known or rng.random() < 0.4:
        return rng.choice(THINGS)
    return " ".join(rng.choices(known, k=rng.choice((0, 1, 1, 2))) + [rng.choice(rng.choice((known, THINGS)))])


def problem(rng: random.Random, known: list[str] = ()) -> tuple[str, str, str]:
    """-> (body, newline, question; its equation as SVAMP writes it; an explanation in words). known: words to call things by."""
    story, questions = rng.choice(STORIES)
    ask, equation, answer = rng.choice(questions)
    while True:
        numbers = {k: number(rng) for k in "wxyzkj"}
        if len({numbers[k] for k in "wxyz"}) == 4 and (solved := work_out(equation, numbers)):
            break
    steps, result = solved
    she = rng.random() < 0.5
    (n, m), (d, e, f) = rng.sample(SHE if she else HE, 2), rng.sample(TIMES, 3)
    o, p, q = (thing(rng, known) for _ in "opq")
    words = dict(n=n, m=m, o=o, p=p, q=q, d=d, e=e, f=f, b=rng.choice(HOLDERS), l=rng.choice(PLACES), he="she" if she else "he", He="She" if she else "He",
                 his="her" if she else "his", him="her" if she else "him", r=result, **numbers)
    told = [line.strip(" .") for line in re.findall(r"[^.]+\.", story.format(**words))]
    lines = list(told)
    if rng.random() < 0.2:
        lines.insert(rng.randint(0, len(lines)), rng.choice(OTHERS).format(**words).rstrip("."))
    if known and rng.random() < 0.2:
        lines.insert(0, " ".join(rng.choices(known, k=rng.randint(4, 10))).capitalize())
    end = "."
    if rng.random() < 0.25:                                    # the last sentence as a condition, as in SVAMP
        last, end = lines[-1], ""
        lines[-1] = "If " + (last if last.split()[0] in (n, m) else last[0].lower() + last[1:])
    text = ". ".join(lines) + end + "\n" + ask.format(**words)
    label = re.sub(r"[wxyz]", lambda k: f"{numbers[k[0]]}.0", f"( {equation} )")
    said = [line + "." for line in told if rng.random() < 0.4]
    for s, op, t, r in steps:
        if rng.random() < 0.6:
            said.append(rng.choice(LEAD).format(v=rng.choice(SAY[op]).format(s=s, t=t)))
        said.append(rng.choice(["{} {} {} = {}.", "So {} {} {} = {}.", "{} {} {} = {}", "This gives {} {} {} = {}."]).format(s, op, t, r))
    said.append(rng.choice(CLOSE).format(c=answer.format(**words)))
    return text, label, " ".join(said)


def pretrain(folder: Path, steps: int, seed: int) -> None:
    """Write the student to `folder`, all at its end."""
    rng = random.Random(f"svamp student {seed}")
    questions = [json.loads(line)["input"] for line in open(fetch_data.ensure("svamp") / "train.jsonl", encoding="utf-8")]
    known = sorted({word for text in questions for word in re.findall(r"\b[a-z][a-z-]{2,}\b", text)} - set(re.findall("[a-z]+", repr(STORIES))))
    problems = [problem(rng, known) for _ in range(100_000)]
    with tempfile.TemporaryDirectory() as work:
        vocab = Path(work, "spiece.model")
        fetch_data.train_vocabulary([*questions * 20, *(" ".join(p) for p in problems[:20_000])], vocab, 3000, 1000)
        tokenizer = t5.Tokenizer(vocab)
        torch.manual_seed(seed)
        model = t5.T5(t5.Config(vocab_size=tokenizer.size + 100, d_model=192, d_kv=32, d_ff=768, num_layers=3, num_decoder_layers=3, num_heads=6, dropout_rate=0.0))
        for stack in (model.encoder, model.decoder):
            torch.nn.init.normal_(stack.bias.weight, std=2.0)      # as for the demo's student: weights/README.md says why
        pairs = [("predict: " + x, y) for x, y, _ in problems] + [("explain: " + x, r) for x, _, r in problems[:50_000]]
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {tokenizer.size} pieces", flush=True)
        t5.pretrain(model, tokenizer, [*questions * 20, *(x for x, _, _ in problems[:5_000])], steps, batch=32, lr=1e-3, pairs=pairs, share=0.9)
        model.save(folder, vocab=vocab)
    print(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="of 32 rows (default: 6000, half an hour on one core)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=fetch_data.HERE / "weights" / "svamp-student", help="folder to write (default: weights/svamp-student)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N generated problems and stop")
    args = parser.parse_args()
    try:
        if args.show:
            rng = random.Random(f"svamp student {args.seed}")
            print("\n\n".join("\n".join(problem(rng)) for _ in range(args.show)))
        else:
            pretrain(args.out, args.steps, args.seed)
    except t5.InputError as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
