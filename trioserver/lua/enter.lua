-- enter: a connection is written down among those of its user, unless there are too many.
--
-- KEYS[1]  ts:{<partition>}:conns:<user>, a hash: <life>/<connection id> -> JSON that ends with
--          "seen":<seconds since 1970>}
-- ARGV     field, value, limit (0 is none), seconds for which an entry counts, '1' if the others
--          are known to live, lives that are over
-- Reply    1 if it is there now; the field of the one that made way for it; or, if it is not
--          there, who is instead: of its own life the fields, of the others the lives
--
-- Nobody is looked at who need not be: only when there seem to be too many, entries that count no
-- more are told from those that do, and removed. Without a limit that is never: then each that
-- comes looks at two, so that what the dead have left behind does not pile up.

local call = redis.call
local key, field = KEYS[1], ARGV[1]
local limit, lasts = tonumber(ARGV[3]), tonumber(ARGV[4])
local MANY = 128
local over = {}
for i = 6, #ARGV do over[ARGV[i]] = true end

-- Returns the life of an entry that counts; removes one that does not.
local function living(name, value, oldest)
  local life = name:match('^([%w._+-]+)/')
  local seen = tonumber(value:match('"seen":(%d+)}$'))
  if life and not over[life] and seen and seen >= oldest then return life end
  call('HDEL', key, name)
end

-- Returns how many count, up to the limit, who they are, and the values of all.
local function look(oldest)
  local mine = field:match('^[^/]+')
  local who, met, count, cursor = {}, {}, 0, '0'
  repeat
    local page = call('HSCAN', key, cursor, 'COUNT', 256)
    cursor = page[1]
    for i = 1, #page[2], 2 do
      local name, value = page[2][i], page[2][i + 1]
      local life = living(name, value, oldest)
      if life and not met[name] then
        met[name] = value
        count = count + 1
        local shown = life == mine and name or life
        if not who[shown] then
          who[shown] = true
          who[#who + 1] = shown
        end
      end
    end
  until cursor == '0' or count >= limit
  return count, who, met
end

-- Returns the oldest of those on the newcomer's device, if it has a name.
local function predecessor(met)
  local device, found, since = cjson.decode(ARGV[2]).device, nil, math.huge
  if device == '' then return nil end
  for name, value in pairs(met) do
    local read, card = pcall(cjson.decode, value)
    local known = read and type(card) == 'table' and type(card.since) == 'number'
    if known and card.device == device and card.since < since then
      found, since = name, card.since
    end
  end
  return found
end

local length = redis.pcall('HLEN', key)
if type(length) == 'table' then
  if not length.err:find('WRONGTYPE', 1, true) then return length end
  call('DEL', key)
  length = 0
end
local reply = 1
if limit > 0 and length >= limit and call('HEXISTS', key, field) == 0 then
  local count, who, met = look(call('TIME')[1] - lasts)
  if count >= limit then
    local before = ARGV[5] == '1' and predecessor(met)
    if not before then return who end
    call('HDEL', key, before)
    reply = before
  end
elseif limit == 0 and length >= MANY then
  local oldest = call('TIME')[1] - lasts
  local some = call('HRANDFIELD', key, 2, 'WITHVALUES')
  for i = 1, #some, 2 do living(some[i], some[i + 1], oldest) end
end
call('HSET', key, field, ARGV[2])
call('EXPIRE', key, lasts)
return reply
