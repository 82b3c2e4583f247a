"""Word lists and patterns behind the template prompts; data only, no logic.

A pattern names its slots in braces; :mod:`vllm_medusa.training.prompts` fills each slot from the
list of the same name. Lists are wide rather than deep: the share of prompt space they cover is
what limits a head trained on them.
"""


def _items(text: str) -> list[str]:
    """Items between bars; line breaks are blanks."""
    return [" ".join(item.split()) for item in text.split("|")]


TOPIC = _items(
    """
    solar panels | volcanoes | the French Revolution | coffee roasting | jazz | chess
    openings | vaccines | black holes | beekeeping | the stock market | inflation |
    photosynthesis | plate tectonics | sourdough bread | marathon training | sleep |
    meditation | the Silk Road | ancient Egypt | the Roman army | the Industrial Revolution
    | railways | bicycles | electric cars | batteries | nuclear fusion | wind turbines |
    recycling | ocean currents | coral reefs | whales | bats | ants | mushrooms | tropical
    rainforests | deserts | glaciers | earthquakes | hurricanes | rainbows | the water cycle
    | the moon landing | Mars rovers | telescopes | comets | gravity | electromagnetism |
    quantum mechanics | relativity | thermodynamics | acids and bases | the periodic table |
    enzymes | DNA | natural selection | the immune system | the human heart | the brain |
    antibiotics | diabetes | nutrition | vegetarian cooking | spices | cheese making | wine
    tasting | tea ceremonies | street food | pasta | chocolate | gardening | houseplants |
    composting | birdwatching | hiking | camping | sailing | scuba diving | surfing | skiing
    | football | basketball | tennis | cricket | the Olympic Games | yoga | dance | opera |
    film noir | animation | photography | oil painting | sculpture | architecture | Gothic
    cathedrals | bridges | skyscrapers | city planning | public transport | remote work |
    job interviews | time management | public speaking | negotiation | leadership | teamwork
    | small businesses | start-ups | marketing | supply chains | taxes | insurance |
    mortgages | retirement | cryptocurrency | central banks | international trade |
    democracy | constitutions | human rights | the United Nations | elections | journalism |
    propaganda | philosophy of mind | stoicism | ethics | logic | probability | prime
    numbers | calculus | geometry | statistics | linear algebra | graph theory |
    cryptography | databases | operating systems | computer networks | compilers | machine
    learning | neural networks | recommendation systems | search engines | web browsers |
    video games | virtual reality | robots | drones | 3D printing | semiconductors | fibre
    optics | satellites | GPS | mobile phones | social media | online privacy | cyber
    security | open source software | libraries | dictionaries | fairy tales | Greek myths |
    Norse myths | Shakespeare | haiku | science fiction | detective stories | translation |
    sign language | Latin | learning a language | primary schools | universities | homework
    | parenting | friendship | grief | happiness | procrastination | habits | memory |
    dreams | colour | music theory | pianos | violins | drums | folk songs | weddings |
    festivals | calendars | clocks | maps | flags | coins | postage stamps | toys | puzzles
    | knitting | pottery | woodworking | home repair | plumbing | interior design | fashion
    | shoes | perfume | airports | hotels | trains in Japan | castles | islands | rivers |
    lakes | mountains | national parks | zoos | dogs | cats | horses | penguins | sharks |
    dinosaurs | elephants | butterflies | honey | salt | gold | diamonds | plastic | paper |
    glass | steel | concrete | cotton | rubber | oil | water supply | farming | fishing |
    forestry | soil | climate change | air pollution | noise | light | sound | magnets |
    engines | aeroplanes | rockets | submarines | lighthouses | pirates | knights | samurai
    | Vikings | the Aztecs | the Ottoman Empire | colonialism | the Cold War | refugees |
    ageing | cities at night
    """
)

ROLE = _items(
    """
    a ship's captain | a tired school teacher | a detective in the 1920s | a robot learning
    to cook | a medieval blacksmith | a talking cat | a friendly doctor | a strict librarian
    | a football coach | a time traveller | an astronaut on Mars | a chef in a busy kitchen
    | an old fisherman | a young inventor | a museum guide | a news presenter | a lawyer | a
    gardener | a travel agent | a stand-up comedian | a king without a kingdom | a dragon
    who is afraid of fire | a software engineer | a farmer | a bus driver | a ghost in a
    hotel | a philosopher | a wizard who lost his staff | a personal trainer | a bank clerk
    | a nurse on a night shift | a mountain guide | a poet | a shop assistant | a judge | a
    mathematician | a historian | a tree that is a thousand years old
    """
)

PLACE = _items(
    """
    Lisbon | Kyoto | Nairobi | Reykjavik | Buenos Aires | Istanbul | Hanoi | Marrakesh |
    Vancouver | Prague | Cape Town | Edinburgh | New Orleans | Mumbai | Seoul | Havana |
    Athens | Oslo | Cairo | Lima | Melbourne | Vienna | Naples | Chicago | Bangkok | Dublin
    | Warsaw | Singapore | Zanzibar | the Scottish Highlands | the Alps | Patagonia | the
    Sahara
    """
)

LANGUAGE = _items(
    """
    Python | Python | Python | JavaScript | Java | C++ | C | Go | Rust | SQL | Bash |
    TypeScript | HTML and CSS
    """
)

CODE_TASK = _items(
    """
    reverses a linked list | checks whether a string is a palindrome | finds the two largest
    numbers in a list | counts the words in a text file | merges two sorted lists | computes
    the greatest common divisor | parses a CSV file | removes duplicates from a list while
    keeping the order | implements a stack | implements a queue with two stacks | performs a
    binary search | sorts a list with merge sort | sorts a list with quicksort | validates
    an email address | converts Celsius to Fahrenheit | generates all permutations of a
    string | finds the most frequent element | flattens a nested list | checks whether
    brackets are balanced | computes a moving average | rotates a matrix by 90 degrees |
    multiplies two matrices | finds the longest common prefix | computes the edit distance
    of two words | traverses a binary tree in order | finds the depth of a binary tree |
    detects a cycle in a graph | finds the shortest path in a grid | solves the coin change
    problem | prints the first n prime numbers | converts a number to Roman numerals |
    converts an integer to binary | encodes text with a Caesar cipher | counts vowels |
    groups anagrams | reads a JSON file and prints its keys | downloads a web page | retries
    a function three times | caches the results of a function | measures how long a function
    takes | draws a triangle of stars | simulates rolling two dice | shuffles a deck of
    cards | plays rock, paper, scissors | keeps a shopping list | models a bank account |
    models a library with books and members | logs messages to a file | splits a string into
    chunks | finds missing numbers in a sequence | transposes a table | computes the area of
    shapes | checks whether a year is a leap year | formats a phone number | finds the
    median of a list | counts inversions | implements a priority queue | implements a trie |
    sums the digits of a number | computes compound interest | renders a simple login form |
    selects the five customers who spent most
    """
)

FORMAT = _items(
    """
    in one paragraph | in three sentences | as a bulleted list | as a numbered list of steps
    | as a table | in simple words for a ten-year-old | for an expert audience | in about
    200 words | with an example | with pros and cons | as a dialogue between two friends |
    in a formal tone | in a humorous tone | as a short story | step by step | as JSON | with
    a short summary at the end | as a letter | in at most 50 words | with a title and
    headings
    """
)

OBJECT = _items(
    """
    phone | backpack | coffee machine | garden chair | notebook | camera | desk lamp |
    bicycle | raincoat | guitar | water bottle | headphones | kitchen knife | board game |
    sleeping bag | vacuum cleaner | alarm clock | toaster | umbrella | fitness watch |
    electric kettle | office chair | tent | puzzle | blender | printer | running shoes |
    cookbook | lamp
    """
)

FEELING = _items(
    """
    nervous | excited | lonely | proud | angry | bored | grateful | confused | hopeful |
    tired | jealous | calm
    """
)

NAME = _items(
    """
    Anna | Ben | Chidi | Dana | Elif | Farid | Grace | Hiro | Ines | Jonas | Kofi | Lena |
    Maya | Noah | Olga | Pablo | Quinn | Rosa | Sam | Tara | Umar | Vera | Wei | Ximena |
    Yusuf | Zoe | Liam | Priya | Marco | Sofia
    """
)

TONGUE = _items(
    """
    French | Spanish | German | Italian | Portuguese | Dutch | Latin | Japanese
    """
)

ANSWER_PATTERNS = _items(
    """
    What is {topic}? | Explain {topic} {format}. | Tell me about {topic}. | Why does {topic}
    matter? | Give me five interesting facts about {topic}. | What are the most common
    misunderstandings about {topic}? | How did {topic} change over the last hundred years? |
    Compare {topic} and {topic2}. | What do {topic} and {topic2} have in common? | Which is
    more important to society, {topic} or {topic2}? Explain your view. | Summarise what a
    beginner should know about {topic} {format}. | What are the advantages and disadvantages
    of {topic}? | Write a quiz with five questions about {topic} and give the answers. |
    Describe an experiment that teaches children about {topic}. | What would happen if there
    were no {topic} any more? | List ten words related to {topic}. | Write an outline of a
    talk about {topic}. | How can I learn more about {topic}? | What problems are connected
    with {topic}, and how could they be solved? | Write an encyclopedia entry about {topic}.
    | What skills does someone working with {topic} need? | Make a study plan of four weeks
    on {topic}. | Explain how {topic} can be useful for {role}. | I feel {feeling} about
    {topic}. What should I do? | Is {topic} good or bad for the environment? | What are
    three open questions about {topic}? | Define {topic} and give two examples. | Describe
    the history of {topic} {format}. | How would you explain {topic} to {role}?
    """
)

WRITE_PATTERNS = _items(
    """
    Write a short story about {topic} with {role} as the main character. | Write a poem
    about {topic}. | Write a haiku about {topic}. | Write a song about {place} and {topic}.
    | Write a letter from {role} to {role2}. | Write an email to my manager asking for two
    days off because of {topic}. | Write a blog post about {topic} {format}. | Write a
    product description for a new {object}. | Write a review of a {object} that broke after
    a week. | Write a speech about {topic} for {role}. | Write a news report about an
    unusual event in {place}. | Write the first chapter of a novel set in {place}. | Write a
    dialogue between {role} and {role2} about {topic}. | Describe a rainy day in {place}
    {format}. | Write an advertisement for a {object} {format}. | Write a complaint about a
    late delivery of a {object}. | Write a thank-you note to {name} for the {object}. |
    Write a diary entry of {role}. | Invent a legend that explains {topic}. | Write a
    limerick about {name} and a {object}. | Write an invitation to a party about {topic}. |
    Write a cover letter for a job connected with {topic}. | Write a persuasive essay on
    {topic}. | Write a short play in which {role} finds a {object}. | Write instructions for
    using a {object} {format}. | Write a bedtime story about {role}. | Write a social media
    post about {topic} {format}. | Write a recommendation letter for {name}, who works on
    {topic}. | Continue this story: {name} opened the door and saw a {object} that nobody
    had ordered.
    """
)

PLAY_PATTERNS = _items(
    """
    Pretend to be {role}. What do you think about {topic}? | You are {role}. Introduce
    yourself. | Act as {role} and give me advice about {topic}. | Imagine you are {role}
    visiting {place}. Describe your day. | Answer as {role}: how do I get better at {topic}?
    | Take the role of {role}. I am {role2}, and we meet in {place}. Start the conversation.
    | You are an interviewer. Ask {role} five questions about {topic}. | Speak like {role}
    and explain {topic}.
    """
)

PLAN_PATTERNS = _items(
    """
    Plan a trip of three days to {place}. | What should I see in {place}? | Plan a weekend
    in {place} for someone who loves {topic}. | How do I choose a good {object}? | How do I
    clean a {object}? | Suggest names for a shop that sells a {object} made by hand. | Give
    me ideas for a present for {name}, who likes {topic}. | Write a weekly schedule for
    {role}. | What should I pack for a week in {place}? | How can {name} make money with
    {topic}? | Suggest a healthy dinner for {name} in {place}. | My {object} does not work.
    What can I check? | I am {feeling}. Can you help me? | Give me ten tips on {topic}. |
    How do I start a club for {topic}? | Write a checklist for {role}. | What are good books
    about {topic}?
    """
)

CODE_PATTERNS = _items(
    """
    Write a {language} function that {code_task}. | Write a {language} program that
    {code_task} and explain it. | How do I write code that {code_task} in {language}? |
    Write {language} code that {code_task}, with tests. | Explain the algorithm behind code
    that {code_task}. | What is the time complexity of a function that {code_task}? |
    Translate this idea into {language}: a tool that {code_task}. | Show two ways to write
    {language} code that {code_task} and compare them. | Write pseudocode that {code_task}.
    | What mistakes do beginners make when they write {language} code that {code_task}? |
    Write a class in {language} that {code_task}. | What is the difference between a list
    and a dictionary in {language}?
    """
)

TEXT_PATTERNS = _items(
    """
    Rewrite this sentence {format}: {name} bought a {object} in {place} because of {topic}.
    | Translate into {tongue}: {name} is {feeling} about the {object}. | Correct the
    grammar: {name} have went to {place} for buy a {object}. | Find the names, places and
    things in this text: {name} met {name2} in {place} and sold a {object}. | Is this review
    positive or negative? "The {object} made me {feeling}, but it was cheap." | Summarise:
    {name} lives in {place} and works on {topic}. Last year {name2} sent a {object}, and
    since then both have been {feeling}. | Give the category of each word: {object},
    {object2}, {place}, {name}. | Extract all numbers: {name} paid {a} dollars for {b}
    pieces of {object} and {c} dollars for shipping. | Turn this into a table: {name} has
    {a} {object}, {name2} has {b} {object2}, and both live in {place}. | Make this text
    longer: {name} was {feeling} in {place}. | Give five synonyms of the word {feeling}. |
    Write a title for a text about {topic} and {place}. | Which of these does not belong:
    {object}, {object2}, {place}? | Return as JSON: name {name}, city {place}, age {b},
    hobby {topic}.
    """
)

MATH_PATTERNS = _items(
    """
    What is {a} + {b}? | What is {a} - {b}? | What is {b} times {c}? | What is {a} divided
    by {c}? | Solve for x: {c}x + {b} = {a}. | {name} has {a} dollars and buys {c} {object}s
    for {b} dollars each. How much does {name} pay? | {name} reads {b} pages a day. How many
    pages does {name} read in {c} days? | A train travels {a} km in {c} hours. What is its
    speed? | A rectangle is {b} cm long and {c} cm wide. What are its area and perimeter? |
    What is {b} percent of {a}? | {name} is {b} years old and {name2} is {c} years older.
    How old are they together in {d} years? | The price of a {object} falls from {a} dollars
    by {b} percent. What does it cost now? | List the first {c} multiples of {d}. | Is {a} a
    prime number? Explain. | {name} shares {a} sweets among {c} friends. How many does each
    get, and how many are left? | What is the average of {a}, {b} and {c}? | A bag holds {b}
    red and {c} blue balls. What is the chance of drawing a red one? | Convert {a} minutes
    into hours and minutes. | Simplify the fraction {b}/{a}. | If f(x) = {c}x^2 - {d}x +
    {b}, what is f({d})? | A shop sold {a} {object}s in the morning and {b} in the
    afternoon, each for {c} dollars. What did it earn? | Which is larger, {a}/{b} or
    {b}/{c}? | A tank holds {a} litres and loses {c} litres an hour. When is it empty? | All
    {object}s in {place} are old. {name} owns a {object} in {place}. Is it old? Explain your
    reasoning. | {name} is taller than {name2}, and {name2} is taller than {name3}. Who is
    the shortest?
    """
)

FOLLOW_UPS = _items(
    """
    Make it shorter. | Make it longer. | Can you give an example? | Explain your answer step
    by step. | Rewrite it for a child. | Rewrite it in a formal tone. | Now write it as a
    list. | Summarise your answer in one sentence. | What are the limits of this? | Are you
    sure? | Translate it into {tongue}. | Give me three alternatives. | What would {role}
    say about it? | How does this relate to {topic}? | Now do the same for {topic}. | Write
    it as a poem. | Which point is the most important one, and why? | Give
    counter-arguments. | Thanks! What should I read next? | Turn it into a dialogue. | What
    if the number were {b} instead? | Use fewer adjectives. | Add a title. | Can you check
    that for mistakes? | Write a conclusion. | Continue.
    """
)

SLOTS = {
    "topic": TOPIC,
    "role": ROLE,
    "place": PLACE,
    "language": LANGUAGE,
    "code_task": CODE_TASK,
    "format": FORMAT,
    "object": OBJECT,
    "feeling": FEELING,
    "name": NAME,
    "tongue": TONGUE,
}

# (share, patterns): knowledge and writing weigh most, as in everyday chat.
PATTERN_GROUPS = (
    (0.24, ANSWER_PATTERNS),
    (0.20, WRITE_PATTERNS),
    (0.08, PLAY_PATTERNS),
    (0.10, PLAN_PATTERNS),
    (0.15, CODE_PATTERNS),
    (0.10, TEXT_PATTERNS),
    (0.13, MATH_PATTERNS),
)
