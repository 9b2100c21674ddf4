"""From labelled rows to a method, in cells: run in this folder."""

# %%
import pandas

from icrouting import Task, compare, load_model
from icrouting.methods import Settings

# %%
tickets = pandas.read_csv("tickets.csv")
teams = sorted(tickets.team.unique())
task = Task.from_rows(tickets, "Ticket: {text}\nTeam:", teams, label="team", name="tickets")

# %%
model, tokenizer = load_model("pinned:smollm2-135m")
settings = Settings(encoder="pinned:minilm", i2cl_epochs=20, tries=1)
found = compare(task, model, tokenizer, "runs/notebook", settings=settings, minutes=10)
print(found.answer)

# %%
new = pandas.DataFrame({"text": ["The lamp of the projector is dead.", "Please unlock my user."]})
predictions = pandas.DataFrame(found.predict(new))
print(new.join(predictions[["label", "probability"]]))
