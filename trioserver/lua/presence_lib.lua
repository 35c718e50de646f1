-- presence: who is subscribed to a topic, on all servers; what its scripts have in common.
--
-- Redis is given this file, a newline, and the file of one script, as one text.
--
-- KEYS[1]  ts:{<partition>}:members:<topic>, a sorted set, all scores 0: one entry for each
--          connection, "<user> <life>/<connection id> <device> <client type> <seconds since 1970>".
--          Nothing in it has a space (what is special is written in hexadecimal), so those of one
--          user lie together, and Redis has them sorted by user.
-- KEYS[2]  ts:{<partition>}:counts:<topic>, a hash: users -> how many different ones are in there;
--          <life> -> how many entries it has
-- ARGV[1]  the channel on which comings and goings are told; empty if they are not
--
-- The entries of dead workers are there until somebody sweeps them away. Until then their users
-- have neither come nor gone: whoever is back before has never been away.

local call = redis.call
local MEMBERS, COUNTS, CHANNEL = KEYS[1], KEYS[2], ARGV[1]
local presence = { by_life = {}, events = {} }

local function user_of(entry)
  return entry:match('^[^ ]*')
end

local function life_of(entry)
  return entry:match('^[^ ]* ([^/ ]*)/') or ''
end

-- Calls visit(entry) for all.
local function each(visit)
  local start = '-'
  repeat
    local page = call('ZRANGEBYLEX', MEMBERS, start, '+', 'LIMIT', 0, 1000)
    for i = 1, #page do visit(page[i]) end
    start = '(' .. (page[#page] or '')
  until #page < 1000
end

-- After one of the keys was lost alone, which nothing here does.
local function recount()
  local users, last, lives = 0, nil, {}
  each(function(entry)
    local user, life = user_of(entry), life_of(entry)
    if user ~= last then users, last = users + 1, user end
    lives[life] = (lives[life] or 0) + 1
  end)
  call('HSET', COUNTS, 'users', users)
  for life, count in pairs(lives) do call('HSET', COUNTS, life, count) end
  local lasts = call('PTTL', MEMBERS)
  if lasts >= 0 then call('PEXPIRE', COUNTS, math.max(lasts, 1)) end
end

-- The size of a key; 0 if it is of the wrong type, then it is removed. Or the error.
local function size(command, key)
  local length = redis.pcall(command, key)
  if type(length) ~= 'table' then return length end
  if not length.err:find('WRONGTYPE', 1, true) then return nil, length end
  call('DEL', key)
  return 0
end

-- Sees to it that both keys are as they should be; returns what Redis says if that cannot be.
function presence.open()
  local length, refused = size('ZCARD', MEMBERS)
  if refused then return refused end
  local known, refused_too = size('HLEN', COUNTS)
  if refused_too then return refused_too end
  if length == 0 and known > 0 then call('DEL', COUNTS) end
  if length > 0 and known == 0 then recount() end
end

local function has(user)
  local first = call('ZRANGEBYLEX', MEMBERS, '[' .. user .. ' ', '(' .. user .. '!', 'LIMIT', 0, 1)
  return first[1] ~= nil
end

local function count(life, by)
  presence.by_life[life] = (presence.by_life[life] or 0) + by
end

local function tell(event, user, users)
  if CHANNEL == '' then return end
  local name = user:gsub('%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end)
  table.insert(presence.events,
    '\1p["' .. event .. '",' .. cjson.encode(name) .. ',' .. math.max(users, 0) .. ']')
end

-- Adds an entry. One that it stands for now, if it is not empty, goes in the same moment.
function presence.add(entry, instead)
  local user = user_of(entry)
  local here = has(user)
  if call('ZADD', MEMBERS, 0, entry) == 1 then count(life_of(entry), 1) end
  if instead ~= '' and call('ZREM', MEMBERS, instead) == 1 then count(life_of(instead), -1) end
  if not here then tell('join', user, call('HINCRBY', COUNTS, 'users', 1)) end
end

function presence.remove(entry)
  if call('ZREM', MEMBERS, entry) == 0 then return end
  count(life_of(entry), -1)
  local user = user_of(entry)
  if not has(user) then tell('leave', user, call('HINCRBY', COUNTS, 'users', -1)) end
end

-- Writes down how many there are of each life, and only then tells what has happened. That comes
-- last of all, because Redis may not let us: then the script ends here, with nothing half-done.
function presence.close()
  for life, by in pairs(presence.by_life) do
    if by ~= 0 and call('HINCRBY', COUNTS, life, by) <= 0 then call('HDEL', COUNTS, life) end
  end
  if call('EXISTS', MEMBERS) == 0 then call('DEL', COUNTS) end
  for _, event in ipairs(presence.events) do call('PUBLISH', CHANNEL, event) end
end
